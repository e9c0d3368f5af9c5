#include <algorithm>
#include <stdexcept>

#include "rows.cuh"
#include "stepwise.cuh"
#include "stepwise.h"

namespace seqattn::gpu {
namespace {

Launch over(int64_t threads, int directions = 1) {
  const int64_t blocks = (threads + kStepThreads - 1) / kStepThreads;
  if (blocks > INT32_MAX) throw std::runtime_error("input: too many values for one CUDA kernel");
  return {.grid = int(blocks), .grid_z = directions, .block = kStepThreads};
}

template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}

Stream on(void* stream) { return static_cast<Stream>(stream); }

// Calls f with a value of the element type.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double());
    case DType::kFloat32:
      return f(float());
    case DType::kBFloat16:
      return f(bfloat16());
    case DType::kFloat16:
      return f(half());
  }
  throw std::runtime_error("dtype: expected float64, float32, bfloat16 or float16");
}

template <class Cell, class F>
bool try_cell(int cell, int number, F&& f) {
  if (cell == number) f(Cell());
  return cell == number;
}

// Calls f with a value of the cell's type.
template <class F>
void with_cell(int cell, F&& f) {
  int number = 0;
  bool found = false;
#define SEQATTN_TRY(Cell) found = try_cell<Cell>(cell, number++, f) || found;
  SEQATTN_FOR_EACH_CELL(SEQATTN_TRY)
#undef SEQATTN_TRY
  if (!found) throw std::runtime_error("cell: expected a number of the registry");
}

template <class F>
void with_cell_and_type(int cell, DType dtype, F&& f) {
  with_cell(cell, [&](auto c) { with_type(dtype, [&](auto t) { f(c, t); }); });
}

}  // namespace

void combine_bias(int cell, DType dtype, int64_t hidden, int directions, const void* const* b_ih,
                  const void* const* b_hh, void* bias, void* stream) {
  const int last = directions - 1;
  with_cell_and_type(cell, dtype, [&](auto c, auto t) {
    using T = decltype(t);
    launch(combine_bias_kernel<decltype(c), T>, over(hidden, directions), on(stream), as<T>(b_ih[0]), as<T>(b_hh[0]),
           as<T>(b_ih[last]), as<T>(b_hh[last]), as<Sum<T>>(bias), hidden);
  });
}

void convert(DType from_type, const void* from, DType to_type, void* to, int64_t count, void* stream) {
  with_type(from_type, [&](auto f) {
    with_type(to_type, [&](auto t) {
      using From = decltype(f);
      using To = decltype(t);
      launch(convert_kernel<From, To>, over(count), on(stream), as<From>(from), as<To>(to), count);
    });
  });
}

void step_forward(const ForwardStep& step, int64_t t, void* stream) {
  const Forward& a = step.args;
  with_cell_and_type(a.cell, a.dtype, [&](auto c, auto e) {
    launch(step_forward_kernel<decltype(c), decltype(e)>, over(a.rows.batch * a.hidden, a.directions), on(stream), step,
           t);
  });
}

void project_forward(const ForwardStep& step, int64_t t, void* stream) {
  const Forward& a = step.args;
  with_type(a.dtype, [&](auto e) {
    launch(project_forward_kernel<decltype(e)>, over(a.rows.batch * a.output, a.directions), on(stream), step, t);
  });
}

void project_backward(const BackwardStep& step, int64_t t, void* stream) {
  const Backward& a = step.args;
  with_type(a.dtype, [&](auto e) {
    launch(project_backward_kernel<decltype(e)>, over(a.rows.batch * a.output, a.directions), on(stream), step, t);
  });
}

void step_backward(const BackwardStep& step, int64_t t, void* stream) {
  const Backward& a = step.args;
  with_cell_and_type(a.cell, a.dtype, [&](auto c, auto e) {
    launch(step_backward_kernel<decltype(c), decltype(e)>, over(a.rows.batch * a.hidden, a.directions), on(stream),
           step, t);
  });
}

void finish_backward(const BackwardStep& step, void* stream) {
  const Backward& a = step.args;
  with_type(a.dtype, [&](auto e) {
    launch(finish_backward_kernel<decltype(e)>, over(a.directions * a.rows.batch * std::max(a.hidden, a.output)),
           on(stream), step);
  });
}

void gather_rows(DType dtype, const Rows& rows, const void* from, void* to, int64_t width, void* stream) {
  with_type(dtype, [&](auto e) {
    using T = decltype(e);
    launch(move_rows_kernel<T, false>, over(rows.steps * rows.batch * width), on(stream), rows, as<T>(from), as<T>(to),
           width);
  });
}

void scatter_rows(DType dtype, const Rows& rows, const void* from, void* to, int64_t width, void* stream) {
  with_type(dtype, [&](auto e) {
    using T = decltype(e);
    launch(move_rows_kernel<T, true>, over(rows.steps * rows.batch * width), on(stream), rows, as<T>(from), as<T>(to),
           width);
  });
}

int64_t column_chunks(int64_t rows) { return std::clamp<int64_t>((rows + 255) / 256, 1, 512); }

void column_sums(DType dtype, const void* from, int64_t rows, int64_t columns, void* partial, void* sums,
                 void* stream) {
  const int64_t chunks = column_chunks(rows), chunk_rows = (rows + chunks - 1) / chunks;
  with_type(dtype, [&](auto e) {
    using T = decltype(e);
    const Launch blocks{.grid = int((columns + kSumColumns - 1) / kSumColumns),
                        .grid_y = int(chunks),
                        .block = kSumColumns * kSumLanes};
    launch(partial_sums_kernel<T>, blocks, on(stream), as<T>(from), rows, columns, chunk_rows, as<Sum<T>>(partial));
    launch(total_sums_kernel<Sum<T>>, over(columns), on(stream), as<Sum<T>>(partial), chunks, columns,
           as<Sum<T>>(sums));
  });
}

void split_bias(int cell, DType dtype, int64_t hidden, const void* sums, void* d_b_ih, void* d_b_hh, void* stream) {
  with_cell_and_type(cell, dtype, [&](auto c, auto e) {
    using T = decltype(e);
    launch(split_bias_kernel<decltype(c), T>, over(hidden), on(stream), as<Sum<T>>(sums), as<T>(d_b_ih), as<T>(d_b_hh),
           hidden);
  });
}

void split(const void* from, int64_t rows, int64_t columns, int64_t ld, void* to, int64_t depth, int64_t begin,
           bool stacked, bool second_low, void* stream) {
  launch(split_kernel<float>, over(rows * columns), on(stream), as<float>(from), rows, columns, ld, as<bfloat16>(to),
         depth, begin, stacked, second_low);
}

void write_values(const int64_t* values, int64_t count, int64_t* to, void* stream) {
  for (int64_t done = 0; done < count; done += kWrittenValues) {
    Values<kWrittenValues> chunk;
    const int64_t n = std::min<int64_t>(count - done, kWrittenValues);
    std::copy_n(values + done, n, chunk.value);
    launch(write_values_kernel<kWrittenValues>, over(kStepThreads), on(stream), chunk, int(n), to + done);
  }
}

}  // namespace seqattn::gpu
