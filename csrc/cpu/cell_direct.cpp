#include "cell_direct.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iterator>
#include <utility>
#include <vector>

#include "cell_launch.h"
#include "dlpack.h"
#include "launch.h"

namespace seqattn {
namespace {

// What cell_connect was given, kept for the life of the process.
struct Connection {
  const dlpack::ExchangeApi* exchange = nullptr;  // null: not connected
  std::vector<PyTypeObject*> types;               // of plain tensors
  std::vector<PyObject*> modes;                   // functions that say whether something follows operators
  PyObject* is_neg = nullptr;                     // whether a tensor's values are those in memory, negated
  PyObject* wrap = nullptr;                       // takes a handle over, returns the tensor
  PyObject* requires_grad = nullptr;              // the attribute's name
};
Connection torch_side;

// Takes the reference over. An exception is no `false`: the dispatcher's way meets and reports it.
bool is_false(PyObject* value) {
  const bool found = value && PyObject_Not(value) == 1;
  Py_XDECREF(value);
  if (PyErr_Occurred()) PyErr_Clear();
  return found;
}

// Whether operators called now would reach their CPU kernels and nothing else.
bool nothing_follows_operators() {
  return torch_side.exchange && std::all_of(torch_side.modes.begin(), torch_side.modes.end(),
                                            [](PyObject* mode) { return is_false(PyObject_CallNoArgs(mode)); });
}

bool records_gradients(PyObject* const* tensors, Py_ssize_t count) {
  return aoti_torch_grad_mode_is_enabled() && std::any_of(tensors, tensors + count, [](PyObject* t) {
           return t != Py_None && !is_false(PyObject_GetAttr(t, torch_side.requires_grad));
         });
}

// Takes memory of tensors as the kernels read it. `plain` turns false, for good, at the first one that isn't a
// contiguous CPU tensor of torch's own class, with the dtype of the first and the shape asked for.
class Reader {
 public:
  bool plain = true;
  int bits = 0;        // of a value
  int64_t shape[2]{};  // of the last tensor

  // Sizes of -1 are any, but not 0: the kernels' other way takes empty tensors.
  template <int kRank>
  void* read(PyObject* object, const int64_t (&expected)[kRank]) {
    void* data = plain ? memory(object, expected, kRank) : nullptr;
    plain = data != nullptr;
    return data;
  }

  template <int kRank>
  void* read_optional(PyObject* object, const int64_t (&expected)[kRank]) {
    return object == Py_None ? nullptr : read(object, expected);
  }

 private:
  void* memory(PyObject* object, const int64_t* expected, int rank) {
    const auto& types = torch_side.types;
    if (std::find(types.begin(), types.end(), Py_TYPE(object)) == types.end()) return nullptr;
    dlpack::Tensor t;
    if (torch_side.exchange->tensor_from_object(object, &t) != 0) {
      PyErr_Clear();  // a layout that DLPack has no words for
      return nullptr;
    }
    if (t.device_type != dlpack::kCpu || t.code != dlpack::kFloat || t.lanes != 1 || t.ndim != rank) {
      return nullptr;
    }
    if (!bits && (t.bits == 32 || t.bits == 64)) bits = t.bits;
    if (t.bits != bits) return nullptr;
    int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
      const int64_t size = t.shape[i];
      if (size == 0 || (expected[i] >= 0 && size != expected[i])) return nullptr;
      if (size != 1 && t.strides[i] != stride) return nullptr;
      stride *= size;
      shape[i] = size;
    }
    if (!is_false(PyObject_CallOneArg(torch_side.is_neg, object))) return nullptr;
    return static_cast<char*>(t.data) + (t.data ? t.byte_offset : 0);
  }
};

// The arguments that forward and backward share: input, h, c, w_ih, w_hh, b_ih, b_hh; without biases 5, or None.
struct Arguments {
  void *x, *h, *c, *w_ih, *w_hh, *b_ih = nullptr, *b_hh = nullptr;
  int64_t batch;
  Sizes sizes{};

  Arguments(Reader* r, const CellInfo& cell, PyObject* const* a, Py_ssize_t count) {
    x = r->read(a[0], {-1, -1});
    batch = r->shape[0];
    sizes.input = r->shape[1];
    w_hh = r->read(a[4], {-1, -1});
    const int64_t H = sizes.hidden = sizes.output = r->shape[1], rows = cell.gates * H;
    r->plain = r->plain && r->shape[0] == rows;
    w_ih = r->read(a[3], {rows, sizes.input});
    h = r->read_optional(a[1], {batch, H});
    c = r->read_optional(a[2], {batch, H});
    if (count == 5 || (a[5] == Py_None && a[6] == Py_None)) return;
    b_ih = r->read(a[5], {rows});
    b_hh = r->read(a[6], {rows});
  }

  template <class T>
  StepProblem<T> problem() const {
    StepProblem<T> p{};
    p.sizes = sizes;
    p.batch = batch;
    p.x = static_cast<T*>(x);
    p.h = static_cast<T*>(h);
    p.c = static_cast<T*>(c);
    p.w_ih = static_cast<T*>(w_ih);
    p.w_hh = static_cast<T*>(w_hh);
    p.b_ih = static_cast<T*>(b_ih);
    p.b_hh = static_cast<T*>(b_hh);
    return p;
  }
};

// The tensors as a tuple of Python's, each with no other owner: autograd then adds to gradients in place.
PyObject* to_python(const std::vector<Tensor>& results) {
  PyObject* handles = PyList_New(Py_ssize_t(results.size()));
  for (size_t i = 0; handles && i < results.size(); ++i) {
    AtenTensorHandle handle;
    if (aoti_torch_new_tensor_handle(results[i].get(), &handle) != AOTI_TORCH_SUCCESS) fail("no memory for a tensor");
    PyObject* capsule = PyCapsule_New(handle, nullptr, nullptr);
    if (!capsule) return nullptr;
    PyList_SET_ITEM(handles, Py_ssize_t(i), capsule);
  }
  PyObject* list = handles ? PyObject_CallOneArg(torch_side.wrap, handles) : nullptr;
  PyObject* tuple = list ? PyList_AsTuple(list) : nullptr;
  Py_XDECREF(list);
  Py_XDECREF(handles);
  return tuple;
}

// Runs `launch` on the problem in its dtype, other Python threads running meanwhile as under torch's own operators.
// The caller's arguments keep the tensors alive.
template <class Launch>
PyObject* run(int bits, Launch&& launch) {
  try {
    std::vector<Tensor> results;
    PyThreadState* state = PyEval_SaveThread();
    try {
      results = bits == 32 ? launch(float()) : launch(double());
    } catch (...) {
      PyEval_RestoreThread(state);
      throw;
    }
    PyEval_RestoreThread(state);
    return to_python(results);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// Number of the cell; -1 with an error set.
int64_t cell_number(PyObject* object) {
  const int64_t number = PyLong_AsLongLong(object);
  if (PyErr_Occurred()) return -1;
  if (number >= 0 && number < int64_t(std::size(kCells))) return number;
  PyErr_Format(PyExc_ValueError, "cell: expected a number of the registry, got %lld", (long long)number);
  return -1;
}

PyObject* wrong_count(const char* function, const char* expected, Py_ssize_t got) {
  PyErr_Format(PyExc_TypeError, "%s: expected %s, got %zd arguments", function, expected, got);
  return nullptr;
}

PyObject* cell_fwd(PyObject*, PyObject* const* a, Py_ssize_t count) {
  constexpr int kFirst = 3;
  if (count != kFirst + 5 && count != kFirst + 7) {
    return wrong_count("cell_fwd", "cell, save, packed, input, h, c and 2 or 4 weights", count);
  }
  const int64_t number = cell_number(a[0]);
  if (number < 0) return nullptr;
  const bool save = a[1] == Py_True;
  PyObject* const* tensors = a + kFirst;
  if ((!save && records_gradients(tensors, count - kFirst)) || !nothing_follows_operators()) Py_RETURN_NONE;
  Reader reader;
  const Arguments arguments(&reader, cell_info(number), tensors, count - kFirst);
  const void* packed = nullptr;
  if (a[2] != Py_None && reader.plain) {
    packed = reader.read(a[2], {step_packed_size(number, arguments.sizes)});
  }
  if (!reader.plain) Py_RETURN_NONE;
  return run(reader.bits, [&](auto type) {
    auto p = arguments.problem<decltype(type)>();
    p.packed = static_cast<decltype(type)*>(const_cast<void*>(packed));
    return launch_step(number, p, save);
  });
}

PyObject* cell_bwd(PyObject*, PyObject* const* a, Py_ssize_t count) {
  constexpr int kFirst = 6;
  if (count != kFirst + 5 && count != kFirst + 7) {
    return wrong_count("cell_bwd", "cell, need_input, need_weights, reserve, d_h, d_c, input, h, c and 2 or 4 weights",
                       count);
  }
  const int64_t number = cell_number(a[0]);
  if (number < 0) return nullptr;
  if (aoti_torch_grad_mode_is_enabled() || !nothing_follows_operators()) Py_RETURN_NONE;
  const CellInfo& cell = cell_info(number);
  Reader reader;
  const Arguments arguments(&reader, cell, a + kFirst, count - kFirst);
  const int64_t B = arguments.batch, H = arguments.sizes.hidden;
  void* reserve = reader.read(a[3], {B, step_reserved(cell.saved) * padded(H)});
  const void* d_h = reader.read_optional(a[4], {B, H});
  const void* d_c = reader.read_optional(a[5], {B, H});
  if (!reader.plain) Py_RETURN_NONE;
  const StepGradients wanted{a[1] == Py_True, arguments.h != nullptr, arguments.c != nullptr, a[2] == Py_True};
  return run(reader.bits, [&](auto type) {
    using T = decltype(type);
    auto p = arguments.problem<T>();
    p.reserve = static_cast<T*>(reserve);
    p.d_h_new = static_cast<const T*>(d_h);
    p.d_c_new = static_cast<const T*>(d_c);
    return launch_step_backward(number, p, wanted);
  });
}

PyObject* cell_connect(PyObject*, PyObject* args) {
  PyObject *types, *modes, *is_neg, *wrap, *capsule;
  if (!PyArg_ParseTuple(args, "O!O!OOO", &PyTuple_Type, &types, &PyTuple_Type, &modes, &is_neg, &wrap, &capsule)) {
    return nullptr;
  }
  auto* exchange = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
  if (!exchange) return nullptr;
  PyObject* name = PyUnicode_InternFromString("requires_grad");
  if (!name) return nullptr;
  Connection made;
  made.exchange = exchange->major == dlpack::kMajorVersion && exchange->tensor_from_object ? exchange : nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i) {
    made.types.push_back(reinterpret_cast<PyTypeObject*>(Py_NewRef(PyTuple_GET_ITEM(types, i))));
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modes); ++i) {
    made.modes.push_back(Py_NewRef(PyTuple_GET_ITEM(modes, i)));
  }
  made.is_neg = Py_NewRef(is_neg);
  made.wrap = Py_NewRef(wrap);
  made.requires_grad = name;
  torch_side = std::move(made);
  Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMethodDef cell_direct_methods[] = {
    {"cell_connect", &cell_connect, METH_VARARGS,
     "cell_connect(types, modes, is_neg, wrap, exchange): what cell_fwd and cell_bwd need of torch. Types of plain "
     "tensors; functions that say whether something follows operators, such as a mode; Tensor.is_neg; what makes "
     "tensors of handles; Tensor.__dlpack_c_exchange_api__."},
    {"cell_fwd", fast(&cell_fwd), METH_FASTCALL,
     "cell_fwd(cell, save, packed, input, h, c, *weights): the results of the operator of this name, or None where it "
     "must be called: something follows operators, gradients are recorded (but with save), or an argument is no plain "
     "contiguous tensor of the right shape. packed: one tensor or None."},
    {"cell_bwd", fast(&cell_bwd), METH_FASTCALL,
     "cell_bwd(cell, need_input, need_weights, reserve, d_h, d_c, input, h, c, *weights): likewise."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace seqattn
