#pragma once

#include <pybind11/pybind11.h>

// The kernels of recurrent layers, as the launcher calls them.
void bind_recurrence(pybind11::module_& m);
// The attentional decoder.
void bind_decoder(pybind11::module_& m);
