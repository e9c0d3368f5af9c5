// Every attention score with fused kernels, once. X(Struct)
#pragma once

#include "additive.h"

#define SEQATTN_SCORES(X) X(Additive)
