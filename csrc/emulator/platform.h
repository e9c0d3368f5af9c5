// The names of ../cuda/platform/*.cuh for the emulator; what they mean is written there. Any C++20 compiler, no CUDA.
#pragma once

#include "platform/launch.h"
#include "platform/matrix.h"
#include "platform/memory.h"
#include "platform/sync.h"
#include "platform/types.h"
