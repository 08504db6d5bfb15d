// window_attention and drift_attention on a GPU against float64 on the CPU, then their times.
//
//   cmake -S . -B build/cpp -G Ninja && cmake --build build/cpp --target attention_probe
//   cd build/cpp/tests/cuda
//   ./attention_probe          correctness, then the table
//   ./attention_probe check    correctness alone; exit status 77 without a GPU
//   ./attention_probe overrun  writes 64 bytes too far, which memcheck must see (tests/sanitize.py)
//
// Rule: error <= 2 x the error that rounding the inputs to the dtype makes in float64, plus noise
// of the result's own format. Memory that must not be read holds NaN, as do outputs and workspaces.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention_case.h"
#include "elastic_cache/drift_attention.h"
#include "elastic_cache/window_attention.h"

using namespace elastic_cache;
using namespace elastic_cache::probe;

namespace {

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("FAIL line %d: %s\n", line, cudaGetErrorString(error));
  std::exit(2);
}
#define CHECK(call) check(call, __LINE__)

// Device memory, every byte 0xff (NaN in every float format) until something is uploaded.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    CHECK(cudaMalloc(&data_, std::max<size_t>(bytes, 16)));
    CHECK(cudaMemset(data_, 0xff, std::max<size_t>(bytes, 16)));
  }
  template <class T>
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size() * sizeof(T)) {
    CHECK(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  ~Buffer() { cudaFree(data_); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  template <class T>
  std::vector<T> download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    CHECK(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

Buffer upload(DType dtype, const std::vector<double>& x) {
  if (dtype == DType::kFloat32) return Buffer(std::vector<float>(x.begin(), x.end()));
  std::vector<__nv_bfloat16> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = __double2bfloat16(x[i]);
  return Buffer(y);
}

std::vector<double> download(DType dtype, const Buffer& x) {
  if (dtype == DType::kFloat32) {
    const auto y = x.download<float>();
    return {y.begin(), y.end()};
  }
  std::vector<double> out;
  for (const __nv_bfloat16 y : x.download<__nv_bfloat16>()) out.push_back(__bfloat162float(y));
  return out;
}

// Parameters of both operators over device memory of the caller.
struct Op {
  WindowAttentionParams attention{};
  DriftAttentionParams drift{};
};

Op make_op(const Shape& shape, int num_sequences, int num_rows, int capacity) {
  Op op;
  auto& a = op.attention;
  auto& d = op.drift;
  a.dtype = d.dtype = shape.dtype;
  a.num_rows = d.num_rows = num_rows;
  a.num_heads = d.num_heads = shape.heads;
  a.num_kv_heads = d.num_kv_heads = shape.kv_heads;
  a.head_dim = d.head_dim = shape.dim;
  a.capacity = d.capacity = capacity;
  a.scale = d.scale = 1 / std::sqrt(static_cast<float>(shape.dim));
  a.num_sequences = d.num_sequences = num_sequences;
  return op;
}

// Of segments the part that says where the first `num_rows` rows are.
std::vector<int32_t> first_rows(std::vector<int32_t> segments, int num_rows) {
  for (size_t s = 0; s < segments.size(); s += kSegmentColumns) {
    int left = num_rows - segments[s];
    segments[s] = std::min(segments[s], num_rows);
    for (int column = kSegmentTracked; column < kSegmentColumns; ++column) {
      int32_t& count = segments[s + static_cast<size_t>(column)];
      count = std::clamp(left, 0, count);
      left -= count;
    }
  }
  return segments;
}

// The first `num_rows` rows: all by drift_attention, fewer by window_attention. `out` is allocated
// `missing_bytes` too short.
Result run(const Case& c, int num_rows, size_t missing_bytes = 0) {
  const Shape& shape = c.shape;
  const bool is_whole = num_rows == c.num_rows();
  const Buffer q = upload(shape.dtype, c.q), k = upload(shape.dtype, c.k);
  const Buffer v = upload(shape.dtype, c.v), rows(c.rows);
  const Buffer segments(first_rows(c.segments, num_rows));
  const Buffer q_old = upload(shape.dtype, c.q_old), k_old = upload(shape.dtype, c.k_old);
  const Buffer key_range(c.key_range);
  const size_t size = shape.dtype == DType::kBFloat16 ? 2 : 4;
  const size_t lanes = static_cast<size_t>(num_rows) * shape.heads;
  const Buffer out(lanes * shape.dim * size - missing_bytes), lse(lanes * sizeof(float));
  const Buffer mass(c.shape.sequences.size() * c.capacity * sizeof(float));
  const Buffer similarity(c.shape.sequences.size() * sizeof(double));
  Op op = make_op(shape, c.num_sequences(), num_rows, c.capacity);
  auto& a = op.attention;
  a.q_cache = q.as<void>(), a.k_cache = k.as<void>(), a.v_cache = v.as<void>();
  a.rows = rows.as<int32_t>(), a.key_range = key_range.as<int32_t>();
  a.segments = segments.as<int32_t>();
  a.out = out.as<void>(), a.lse = lse.as<float>();
  const Buffer attention_space(static_cast<size_t>(window_attention_workspace(a)));
  a.workspace = attention_space.as<void>();
  auto& d = op.drift;
  d.q_cache = a.q_cache, d.k_cache = a.k_cache, d.rows = a.rows, d.key_range = a.key_range;
  bool has_tracked = false;
  for (const Sequence& s : shape.sequences) has_tracked |= s.tracked > 0;
  if (has_tracked) d.q_old = q_old.as<void>(), d.k_old = k_old.as<void>();
  d.v_cache = a.v_cache, d.out = a.out;
  d.segments = segments.as<int32_t>(), d.lse = a.lse;
  d.mass = mass.as<float>(), d.similarity = similarity.as<double>();
  const Buffer drift_space(static_cast<size_t>(drift_attention_workspace(d)));
  d.workspace = drift_space.as<void>();
  if (is_whole) {
    drift_attention_cuda(d, nullptr);
  } else {
    window_attention_cuda(a, nullptr);
  }
  CHECK(cudaDeviceSynchronize());
  Result result;
  result.out = download(shape.dtype, out);
  result.lse = download(DType::kFloat32, lse);
  result.mass = download(DType::kFloat32, mass);
  result.similarity = similarity.download<double>();
  return result;
}

struct Verdict {
  double error = 0.0;  // largest
  double limit = 0.0;
  bool is_right = true;
};

// `noise` is relative to the largest value.
Verdict compare(const std::vector<double>& got, const std::vector<double>& want,
                const std::vector<double>& unrounded, double noise) {
  Verdict verdict;
  double largest = 0.0, rounding = 0.0;
  verdict.is_right = got.size() == want.size();
  for (size_t i = 0; i < want.size() && verdict.is_right; ++i) {
    if (std::isinf(want[i])) {
      verdict.is_right = got[i] == want[i];
      continue;
    }
    largest = std::max(largest, std::fabs(want[i]));
    rounding = std::max(rounding, std::fabs(want[i] - unrounded[i]));
    const double error = std::fabs(got[i] - want[i]);
    if (!(error <= verdict.error)) verdict.error = error;  // NaN stays
    if (std::isnan(error)) break;
  }
  verdict.limit = 2 * rounding + noise * largest;
  if (!(verdict.error <= verdict.limit)) verdict.is_right = false;
  return verdict;
}

bool has_same_bits(const std::vector<double>& a, const std::vector<double>& b, size_t count) {
  return std::memcmp(a.data(), b.data(), count * sizeof(double)) == 0;
}

bool check_case(const Shape& shape) {
  const Case exact = make_case(shape), c = rounded(exact);
  const Result unrounded = reference(exact), want = reference(c);
  const Result got = run(c, c.num_rows()), again = run(c, c.num_rows());
  const double single = 16 * 0x1p-24 * want.largest_score;
  const double own = shape.dtype == DType::kBFloat16 ? 0x1p-8 : single;
  const Verdict out = compare(got.out, want.out, unrounded.out, own);
  const Verdict lse = compare(got.lse, want.lse, unrounded.lse, single);
  const Verdict mass = compare(got.mass, want.mass, unrounded.mass, single);
  const Verdict similarity = compare(got.similarity, want.similarity, unrounded.similarity, single);
  bool is_same = has_same_bits(got.out, again.out, got.out.size()) &&
                 has_same_bits(got.lse, again.lse, got.lse.size()) &&
                 has_same_bits(got.mass, again.mass, got.mass.size()) &&
                 has_same_bits(got.similarity, again.similarity, got.similarity.size());
  // A row's bits do not depend on the rows beside it.
  const int some = std::min(c.num_rows(), 9);
  const Result fewer = run(c, some);
  is_same = is_same && has_same_bits(got.out, fewer.out, fewer.out.size()) &&
            has_same_bits(got.lse, fewer.lse, fewer.lse.size());
  const bool is_right =
      out.is_right && lse.is_right && mass.is_right && similarity.is_right && is_same;
  int tracked = 0, keys = 0;
  for (const Sequence& s : shape.sequences) {
    tracked += s.tracked, keys = std::max(keys, s.end_key - s.first_key);
  }
  std::printf(
      "%-4s %s R %3d T %4d S %d H %2d/%-2d D %3d tracked %2d  out %.1e/%.1e  "
      "lse %.1e/%.1e  mass %.1e/%.1e  similarity %.1e/%.1e%s\n",
      is_right ? "PASS" : "FAIL", shape.dtype == DType::kBFloat16 ? "bf16" : "fp32", c.num_rows(),
      keys, c.num_sequences(), shape.heads, shape.kv_heads, shape.dim, tracked, out.error,
      out.limit, lse.error, lse.limit, mass.error, mass.limit, similarity.error, similarity.limit,
      is_same ? "" : "  NOT THE SAME BITS");
  std::fflush(stdout);
  return is_right;
}

bool check_all() {
  bool is_right = true;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int rows : {0, 1, 15, 16, 17, 64, 128}) {
      const int tracked = rows / 5, rest = rows - tracked;
      is_right &= check_case({dtype, 4, 4, 128, {{tracked, rest / 4, rest - rest / 4, 0, 3, 203}}});
    }
    for (const int keys : {1, 63, 64, 65, 127, 129, 512, 1024}) {
      is_right &= check_case({dtype, 4, 2, 64, {{3, 2, 12, 2, 0, keys}}, 3});
    }
    for (const int dim : {2, 6, 32, 64, 80, 128}) {
      for (const int kv_heads : {1, 2, 6}) {
        is_right &=
            check_case({dtype, 6, kv_heads, dim, {{2, 1, 9, 1, 5, 150}, {1, 0, 6, 2, 0, 70}}});
      }
    }
    for (const int tracked : {0, 1, 12, 40, 70}) {
      is_right &= check_case({dtype, 8, 8, 32, {{tracked, 3, 20, 1, 1, 300}}, 2});
    }
    // No keys; no rows; rows skipped everywhere; three sequences in one tile of rows.
    is_right &= check_case({dtype, 4, 2, 32, {{2, 0, 5, 0, 4, 4}, {0, 0, 0, 0, 0, 9}}, 1});
    is_right &= check_case({dtype, 4, 2, 64, {{7, 2, 30, 3, 0, 190}, {2, 0, 9, 0, 9, 333}}, 5, 3});
    is_right &= check_case(
        {dtype, 4, 4, 128, {{1, 1, 3, 0, 0, 90}, {2, 0, 3, 1, 7, 1000}, {0, 0, 4, 0, 130, 260}}});
  }
  is_right &= check_case({DType::kBFloat16, 32, 32, 128, {{12, 4, 32, 0, 0, 1024}}});
  return is_right;
}

// ---- Times: LLaDA-8B layers, each with its own cache, so that none is found in L2 ----

struct Layer {
  Buffer q, k, v;
};

double median_microseconds(const std::vector<WindowAttentionParams>& ops) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t instance;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (const WindowAttentionParams& op : ops) window_attention_cuda(op, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&instance, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 25; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(instance, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaStreamSynchronize(stream));
    float milliseconds = 0.0f;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 5) times.push_back(milliseconds);
  }
  std::sort(times.begin(), times.end());
  CHECK(cudaGraphExecDestroy(instance));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaStreamDestroy(stream));
  return 1e3 * times[times.size() / 2] / static_cast<double>(ops.size());
}

Buffer random_bf16(size_t count) {
  static std::vector<__nv_bfloat16> values;
  if (values.empty()) {
    values.resize((1 << 20) + 77);  // an odd period: no two layers are alike
    for (auto& x : values) x = __double2bfloat16(normal());
  }
  std::vector<__nv_bfloat16> host(count);
  const size_t offset = static_cast<size_t>(uniform() * 1e6);
  for (size_t i = 0; i < count; ++i) host[i] = values[(i + offset) % values.size()];
  return Buffer(host);
}

void time_shape(int num_keys, int num_rows) {
  constexpr int kHeads = 32, kDim = 128, kLayers = 16;
  const size_t width = kHeads * kDim, keys = num_keys, num = num_rows;
  std::vector<int32_t> rows;
  for (int r = 0; r < num_rows; ++r) rows.push_back(num_keys / 2 + r);
  const Buffer row_list(rows), key_range(std::vector<int32_t>{0, num_keys});
  WindowAttentionParams op =
      make_op({DType::kBFloat16, kHeads, kHeads, kDim, {}}, 1, num_rows, num_keys).attention;
  const Buffer space(static_cast<size_t>(window_attention_workspace(op)));
  const Buffer out(num * width * 2), lse(num * kHeads * 4);
  op.rows = row_list.as<int32_t>(), op.key_range = key_range.as<int32_t>();
  op.out = out.as<void>(), op.lse = lse.as<float>(), op.workspace = space.as<void>();
  std::vector<Layer> layers;
  std::vector<WindowAttentionParams> ops;
  for (int i = 0; i < kLayers; ++i) {
    layers.push_back(
        {random_bf16(keys * width), random_bf16(keys * width), random_bf16(keys * width)});
    const Layer& layer = layers.back();
    op.q_cache = layer.q.as<void>(), op.k_cache = layer.k.as<void>();
    op.v_cache = layer.v.as<void>();
    ops.push_back(op);
  }
  const double attention = median_microseconds(ops);
  const double bytes = 2.0 * static_cast<double>(keys * width) * 2.0;
  std::printf("%5d %5d %10.2f %8.0f\n", num_keys, num_rows, attention, bytes / attention / 1e3);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    std::printf("SKIP: %s\n", cudaGetErrorString(error));
    return 77;  // what ctest is told to take for a skipped test
  }
  CHECK(error);
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  int driver = 0;
  CHECK(cudaDriverGetVersion(&driver));
  std::printf("%s, %d SMs, CUDA %d, driver API %d\n", device.name, device.multiProcessorCount,
              CUDART_VERSION, driver);
  if (argc > 3 && std::string(argv[1]) == "time") {
    time_shape(std::atoi(argv[2]), std::atoi(argv[3]));
    return 0;
  }
  if (argc > 1 && std::string(argv[1]) == "overrun") {
    const Case c = rounded(make_case({DType::kBFloat16, 4, 4, 64, {{1, 1, 6, 0, 0, 40}}}));
    run(c, c.num_rows(), 64);
    return 0;
  }
  const bool is_right = check_all();
  std::printf("%s\n", is_right ? "PASS" : "FAIL");
  if (argc > 1 && std::string(argv[1]) == "check") return is_right ? 0 : 1;
  std::printf("\nLLaDA-8B layer (32 heads of 128, bf16), microseconds a layer; GB/s of K and V\n");
  std::printf("%5s %5s %10s %8s\n", "T", "rows", "attention", "GB/s");
  for (const int num_keys : {512, 1024, 2048, 4096}) {
    for (const int num_rows : {16, 32, 64, 128}) time_shape(num_keys, num_rows);
  }
  return is_right ? 0 : 1;
}
