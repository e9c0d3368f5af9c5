// Every cell the native kernels know. To add one: its header beside this file, and a line here.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

#define SEQATTN_FOR_EACH_CELL(DO) \
  DO(RnnTanh)                     \
  DO(RnnRelu)                     \
  DO(Gru)                         \
  DO(Lstm)
