// The cell operators called from Python past torch's dispatcher, where nothing can tell: a step of one row takes less
// time than the dispatcher.
#pragma once

#include <Python.h>

namespace seqattn {

// cell_connect, cell_fwd and cell_bwd of the module _C; ends with a null entry.
extern PyMethodDef cell_direct_methods[];

}  // namespace seqattn
