#include "problem.h"

#include "stepwise.h"

namespace seqattn::gpu {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

DType dtype_of_input(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail("input: expected float64, float32, bfloat16 or float16, got ", dtype_text(input.scalar_type()));
  }
}

}  // namespace

Problem::Problem(int64_t cell_number, const Tensor& input, const OptionalTensor& sizes, int64_t layout,
                 const std::vector<Tensor>& weights, bool has_bias, bool allow_tf32)
    : number(int(cell_number)),
      cell(cell_info(cell_number)),
      dtype(dtype_of_input(input)),
      type(input.scalar_type()),
      sum_type(dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float),
      item(dtype == DType::kFloat64   ? 8
           : dtype == DType::kFloat32 ? 4
                                      : 2),
      sum_item(dtype == DType::kFloat64 ? 8 : 4),
      has_bias(has_bias),
      allow_tf32(allow_tf32),
      directions(0),
      layout(layout),
      input(input),
      weights(weights),
      row_data_(input) {
  if (layout < kTimeMajor || layout > kPackedRows) fail("layout: expected 0, 1 or 2, got ", layout);
  const int64_t rank = layout == kPackedRows ? 2 : 3;
  if (input.dim() != rank) fail("input: expected ", rank, " dimensions, got shape ", shape_of(input));
  check_device("input", input);
  if (!input.is_contiguous()) fail("input: expected a contiguous tensor");
  read_weights();
  read_rows(sizes);
}

void Problem::read_weights() {
  if (weights.size() < 2 || weights[1].dim() != 2) fail("weights: expected w_ih [G*H, I] and w_hh [G*H, H] first");
  sizes.input = input.size(-1);
  sizes.hidden = weights[1].size(0) / cell.gates;
  sizes.output = weights[1].size(1);
  sizes.projected = sizes.output != sizes.hidden;
  if (sizes.projected && !cell.has_cell) {
    fail("weight_hh: expected [", weights[1].size(0), ", ", sizes.hidden, "], got ", shape_of(weights[1]));
  }
  const size_t base = has_bias ? 4 : 2, each = base + (sizes.projected ? 1 : 0), count = weights.size() / each;
  if (count * each != weights.size() || count < 1 || count > 2) {
    fail("weights: expected ", each, " tensors for each of one or two directions, got ", weights.size());
  }
  directions = int(count);
  const int64_t gates = cell.gates * sizes.hidden;
  for (int d = 0; d < directions; ++d) {
    whole("weight_ih", weight(d, 0), input, type, {gates, sizes.input});
    whole("weight_hh", weight(d, 1), input, type, {gates, sizes.output});
    if (has_bias) {
      whole("bias_ih", weight(d, 2), input, type, {gates});
      whole("bias_hh", weight(d, 3), input, type, {gates});
    }
    if (sizes.projected) whole("weight_hr", weight(d, base), input, type, {sizes.output, sizes.hidden});
  }
}

void Problem::read_rows(const OptionalTensor& sizes_or_lengths) {
  if (layout == kPackedRows) return read_packed(sizes_or_lengths);
  const bool batch_first = layout == kBatchFirst;
  rows.steps = input.size(batch_first ? 1 : 0);
  rows.batch = input.size(batch_first ? 0 : 1);
  rows.rows = rows.steps * rows.batch;
  rows.out_step = batch_first ? 1 : rows.batch;
  rows.out_batch = batch_first ? rows.steps : 1;
  if (sizes_or_lengths) read_lengths(*sizes_or_lengths);
}

void Problem::read_lengths(const Tensor& lengths) {
  if (lengths.dim() != 1 || lengths.size(0) != rows.batch) {
    fail("lengths: expected [", rows.batch, "], got ", shape_of(lengths));
  }
  if (lengths.scalar_type() != ScalarType::Long || !lengths.is_contiguous()) {
    fail("lengths: expected a contiguous tensor of int64");
  }
  if (lengths.is_cuda()) {
    if (lengths.get_device_index() != input.get_device_index()) {
      fail("lengths: expected device ", device_text(input), " (from input) or cpu, got ", device_text(lengths));
    }
    row_data_ = lengths;
    rows.lengths = lengths.const_data_ptr<int64_t>();
    return;
  }
  if (!lengths.is_cpu()) fail("lengths: expected a CPU or CUDA tensor, got one on ", device_text(lengths));
  const int64_t* values = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < rows.batch; ++b) {
    if (values[b] < 0 || values[b] > rows.steps) {
      fail("lengths: expected values from 0 to ", rows.steps, " (steps of the input), got ", values[b], " at ", b);
    }
  }
  row_data_ = torch::stable::new_empty(input, {rows.batch}, ScalarType::Long);
  write_values(values, rows.batch, row_data_.mutable_data_ptr<int64_t>(), stream());
  rows.lengths = row_data_.const_data_ptr<int64_t>();
}

void Problem::read_packed(const OptionalTensor& sizes_or_none) {
  if (!sizes_or_none) fail("sizes: expected the batch sizes of the packed sequence, got None");
  const Tensor& t = *sizes_or_none;
  if (t.dim() != 1 || t.scalar_type() != ScalarType::Long || !t.is_contiguous() || !t.is_cpu()) {
    fail("sizes: expected a contiguous CPU tensor of int64 with one dimension");
  }
  const int64_t* sizes = t.const_data_ptr<int64_t>();
  rows.steps = t.size(0);
  rows.batch = rows.steps ? sizes[0] : 0;
  rows.rows = input.size(0);
  std::vector<int64_t> values(rows.steps + 1, 0);  // offsets, then lengths
  for (int64_t s = 0; s < rows.steps; ++s) {
    if (sizes[s] < 1 || (s && sizes[s] > sizes[s - 1])) {
      fail("batch_sizes: expected positive sizes that never grow, got ", sizes[s], " at step ", s);
    }
    values[s + 1] = values[s] + sizes[s];
  }
  if (values[rows.steps] != rows.rows) {
    fail("batch_sizes: expected a sum of ", rows.rows, " (rows of the data), got ", values[rows.steps]);
  }
  for (int64_t b = 0, length = rows.steps; b < rows.batch; ++b) {
    while (sizes[length - 1] <= b) --length;
    values.push_back(length);
  }
  row_data_ = torch::stable::new_empty(input, {int64_t(values.size())}, ScalarType::Long);
  write_values(values.data(), int64_t(values.size()), row_data_.mutable_data_ptr<int64_t>(), stream());
  rows.offsets = row_data_.const_data_ptr<int64_t>();
  rows.lengths = rows.offsets + rows.steps + 1;
}

void* Problem::checked(const char* name, const OptionalTensor& t, const std::vector<int64_t>& shape) const {
  return const_cast<void*>(whole(name, t, input, type, shape));
}

void* Problem::stream() const { return current_stream(input.get_device_index()); }

Tensor Problem::allocate(const std::vector<int64_t>& shape, ScalarType scalar_type, int64_t bytes_each) const {
  try {
    return torch::stable::new_empty(input, shape, scalar_type);
  } catch (const std::exception& error) {
    // Older versions of torch print the reason and throw no more than that a call failed.
    double bytes = double(bytes_each);
    for (const int64_t n : shape) bytes *= double(n);
    fail("out of memory? ", device_text(input), " gave no ", bytes / (1 << 20), " MiB: ", error.what());
  }
}

Tensor Problem::make(const std::vector<int64_t>& shape) const { return allocate(shape, type, item); }

Tensor Problem::make_sum(const std::vector<int64_t>& shape) const { return allocate(shape, sum_type, sum_item); }

Tensor Problem::make_bytes(int64_t bytes) const { return allocate({bytes}, ScalarType::Byte, 1); }

std::vector<int64_t> Problem::rows_shape(int64_t columns) const {
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = columns;
  return shape;
}

// Mirrored by _cuda_reserve_bytes in seqattn_kernels/ops/recurrence.py.
int64_t Problem::parts(Reserve* reserve, char* bytes) const {
  const int64_t count = directions * rows.rows;
  int64_t used = 0;
  const auto take = [&](bool wanted, int64_t size) -> void* {
    if (!wanted) return nullptr;
    void* part = bytes ? bytes + used : nullptr;
    used += aligned(size);
    return part;
  };
  Reserve found;
  found.saved = take(true, count * sizes.hidden * kept(cell.saved, cell.has_cell) * item);
  found.cells = take(cell.has_cell, count * sizes.hidden * sum_item);
  found.h_prev = take(true, count * sizes.output * item);
  found.unprojected = take(sizes.projected, count * sizes.hidden * item);
  if (reserve) *reserve = found;
  return used;
}

int64_t Problem::reserve_bytes() const { return parts(nullptr, nullptr); }

Reserve Problem::reserve(void* bytes) const {
  Reserve found;
  parts(&found, static_cast<char*>(bytes));
  return found;
}

Matrix Problem::recurrent_weight(bool projection) {
  const size_t i = projection ? stride() - 1 : 1;
  const int64_t r = weight(0, i).size(0), c = weight(0, i).size(1);
  if (directions == 1) return {weight_data(0, i), r, c, c};
  Tensor both = make({directions, r, c});
  for (int d = 0; d < directions; ++d) {
    char* to = static_cast<char*>(both.mutable_data_ptr()) + d * r * c * item;
    convert(dtype, weight_data(d, i), dtype, to, r * c, stream());
  }
  stacked_.push_back(both);
  return {both.mutable_data_ptr(), r, c, c, false, directions, r * c};
}

}  // namespace seqattn::gpu
