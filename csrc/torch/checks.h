// Checks of an op's tensor arguments, and their data pointers.
// The constructor of Checks looks at device, dtype and layout of all arguments, shape() at one
// shape, so an op that calls them in this order reports the most basic mistake first. A failed
// check throws std::invalid_argument with a sentence: op, argument, rule, what was seen.
// The checks of values are for the CPU call alone: there they cost nothing beside the kernel and
// keep a wrong index from writing over foreign memory; on a GPU they would need a host sync.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "elastic_cache/types.h"

namespace elastic_cache::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Type { kModel, kBool, kInt32, kInt64, kFloat32, kFloat64 };  // kModel: DType

enum class Memory {
  kContiguous,
  kRows,    // [rows, width]: each row contiguous, rows any distance apart
  kMatrix,  // the same; on a GPU, whose products are the vendor's, columns may be contiguous
            // instead
};

struct Argument {
  const char* name;
  const Tensor* tensor;  // null: an optional argument that was not given
  Type type;
  Memory memory;

  Argument(const char* name, const Tensor& tensor, Type type, Memory memory = Memory::kContiguous)
      : name(name), tensor(&tensor), type(type), memory(memory) {}
  Argument(const char* name, const std::optional<Tensor>& tensor, Type type)
      : name(name), tensor(tensor ? &*tensor : nullptr), type(type), memory(Memory::kContiguous) {}
};

inline constexpr int64_t kAnySize = -1;

struct Dim {
  const char* name;  // as the op's header calls it
  int64_t size = kAnySize;
};

// Sizes of the three caches of a layer.
struct CacheShape {
  int64_t slots;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
};

class Checks {
 public:
  // The first argument is always given; its device is everybody's device, and the first argument
  // of Type::kModel sets the model's dtype.
  Checks(const char* op, std::initializer_list<Argument> arguments) : op_(op) {
    for (const Argument& argument : arguments) {
      if (argument.tensor) check_device(*arguments.begin(), argument);
    }
    const Argument* model = nullptr;
    for (const Argument& argument : arguments) {
      if (!argument.tensor) continue;
      if (argument.type == Type::kModel && !model) model = &argument;
      check_dtype(argument, model);
    }
    for (const Argument& argument : arguments) {
      if (argument.tensor) check_layout(argument);
    }
  }

  DType dtype() const { return dtype_; }

  void shape(const char* name, const Tensor& tensor, std::initializer_list<Dim> dims) const {
    const auto sizes = tensor.sizes();
    bool is_as_expected = sizes.size() == dims.size();
    for (size_t i = 0; is_as_expected && i < dims.size(); ++i) {
      const int64_t expected = dims.begin()[i].size;
      is_as_expected = expected == kAnySize || expected == sizes[i];
    }
    if (!is_as_expected) fail_shape(name, tensor, dims);
  }

  void shape(const char* name, const std::optional<Tensor>& tensor,
             std::initializer_list<Dim> dims) const {
    if (tensor) shape(name, *tensor, dims);
  }

  // `sentence` is what must hold and what was seen, in parts; it is put together on failure only.
  template <typename... Parts>
  void that(bool holds, const Parts&... sentence) const {
    if (!holds) fail(sentence...);
  }

  // q_cache [slots, heads, head_dim], k_cache and v_cache [slots, kv_heads, head_dim].
  CacheShape caches(const Tensor& q_cache, const Tensor& k_cache, const Tensor& v_cache) const {
    shape("q_cache", q_cache, {{"slots"}, {"heads"}, {"head_dim"}});
    const int64_t slots = q_cache.size(0), head_dim = q_cache.size(2);
    shape("k_cache", k_cache, {{"slots", slots}, {"kv_heads"}, {"head_dim", head_dim}});
    const int64_t kv_heads = k_cache.size(1);
    shape("v_cache", v_cache, {{"slots", slots}, {"kv_heads", kv_heads}, {"head_dim", head_dim}});
    return {slots, q_cache.size(1), kv_heads, head_dim};
  }

  void heads(int64_t heads, int64_t kv_heads) const {
    that(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0,
         "heads of q_cache must be a multiple of kv_heads of k_cache, got ", heads, " and ",
         kv_heads);
  }

  // What rotating rows at the positions of their slots needs.
  void rope(int64_t head_dim, int64_t slots, int64_t capacity, int64_t positions) const {
    that(head_dim % 2 == 0, "head_dim must be even, got ", head_dim);
    that(capacity >= 1 && slots % capacity == 0, "capacity must be at least 1 and divide the ",
         slots, " slots, got ", capacity);
    that(positions >= capacity, "rope must have a row for each of ", capacity, " positions, got ",
         positions);
  }

  // Slots of one sequence, all sequences having equally many.
  int64_t capacity(int64_t slots, int64_t num_sequences) const {
    that(num_sequences > 0 ? slots % num_sequences == 0 : slots == 0,
         "slots of q_cache must be a multiple of the number of sequences, got ", slots, " and ",
         num_sequences);
    return num_sequences > 0 ? slots / num_sequences : 0;
  }

  // Values are looked at on the CPU only: on a GPU that would stop the host until it is idle.

  // Every value of an int32 tensor is -1 or an index below `limit`.
  void indices(const char* name, const Tensor& tensor, int64_t limit) const {
    if (!tensor.is_cpu()) return;
    const auto* values = static_cast<const int32_t*>(tensor.const_data_ptr());
    const int64_t count = tensor.numel();
    for (int64_t i = 0; i < count; ++i) {
      that(values[i] >= -1 && values[i] < limit, name, " must hold -1 or indices below ", limit,
           ", got ", values[i], " at element ", i);
    }
  }

  // key_range [S, 2]: 0 <= first <= one past the last <= capacity.
  void key_range(const Tensor& tensor, int64_t capacity) const {
    if (!tensor.is_cpu()) return;
    const auto* range = static_cast<const int32_t*>(tensor.const_data_ptr());
    const int64_t num_sequences = tensor.size(0);
    for (int64_t s = 0; s < num_sequences; ++s) {
      const int32_t first = range[2 * s], end = range[2 * s + 1];
      that(0 <= first && first <= end && end <= capacity,
           "key_range must hold 0 <= first <= end <= capacity = ", capacity, ", got first ", first,
           " and end ", end, " for sequence ", s);
    }
  }

  // segments [S, columns] stay inside the row list, and tracked rows come with what they overwrote.
  void segments(const Tensor& tensor, int64_t num_rows, bool has_old) const {
    if (!tensor.is_cpu()) return;
    const auto* segment = static_cast<const int32_t*>(tensor.const_data_ptr());
    for (int64_t s = 0; s < tensor.size(0); ++s, segment += kSegmentColumns) {
      const int64_t end = end_row(segment);
      const bool is_inside =
          std::all_of(segment, segment + kSegmentColumns, [](int32_t value) { return value >= 0; });
      that(is_inside && end <= num_rows, "segments must lie inside the ", num_rows,
           " rows, got begin ", segment[kSegmentBegin], " and end ", end, " for sequence ", s);
      that(has_old || segment[kSegmentTracked] == 0,
           "q_old and k_old must be given when a sequence has tracked rows, got none for the ",
           segment[kSegmentTracked], " tracked rows of sequence ", s);
    }
  }

  // Rows lie sequence by sequence, from row 0 on, as segments [S, columns] that are inside the list
  // say; behind those of the last sequence all are skipped.
  void rows_of_segments(const Tensor& rows, const Tensor& segments, int64_t capacity) const {
    if (!rows.is_cpu()) return;
    const auto* slots = static_cast<const int32_t*>(rows.const_data_ptr());
    const auto* segment = static_cast<const int32_t*>(segments.const_data_ptr());
    const int64_t num_sequences = segments.size(0);
    const auto are_of = [&](int64_t row, int64_t end, int64_t sequence) {
      for (; row < end; ++row) {
        that(slots[row] < 0 || slots[row] / capacity == sequence,
             "rows must be of the sequence that segments says, got slot ", slots[row], " at row ",
             row);
      }
    };
    int64_t begin = 0;
    for (int64_t s = 0; s < num_sequences; ++s, segment += kSegmentColumns) {
      that(segment[kSegmentBegin] == begin, "segments must lie one behind the other, got begin ",
           segment[kSegmentBegin], " instead of ", begin, " for sequence ", s);
      are_of(begin, end_row(segment), s);
      begin = end_row(segment);
    }
    are_of(begin, rows.size(0), num_sequences);  // of which there is no slot
  }

 private:
  // One past the last row of a segment: where it begins, and how many there are of each kind.
  static int64_t end_row(const int32_t* segment) {
    return std::accumulate(segment, segment + kSegmentColumns, int64_t{0});
  }

  const char* op_;
  DType dtype_ = DType::kFloat32;

  // Outside of `that`, because the sentences below are costly to prepare.
  void check_device(const Argument& first, const Argument& argument) const {
    const auto expected = first.tensor->device(), seen = argument.tensor->device();
    if (expected.type() != seen.type() || expected.index() != seen.index()) {
      fail(argument.name, " must be on the device of ", first.name, " (",
           device_name(*first.tensor), "), got ", device_name(*argument.tensor));
    }
  }

  void check_dtype(const Argument& argument, const Argument* model) {
    const ScalarType seen = argument.tensor->scalar_type();
    if (argument.type != Type::kModel) {
      const ScalarType expected = scalar_type(argument.type);
      if (seen != expected) {
        fail(argument.name, " must be ", dtype_name(expected), ", got ", dtype_name(seen));
      }
    } else if (&argument == model) {
      if (seen != ScalarType::Float && seen != ScalarType::BFloat16) {
        fail(argument.name, " must be float32 or bfloat16, got ", dtype_name(seen));
      }
      dtype_ = seen == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
    } else if (seen != model->tensor->scalar_type()) {
      fail(argument.name, " must have the dtype of ", model->name, " (",
           dtype_name(model->tensor->scalar_type()), "), got ", dtype_name(seen));
    }
  }

  void check_layout(const Argument& argument) const {
    const Tensor& tensor = *argument.tensor;
    const int64_t last = tensor.dim() - 1;
    const auto is_dense = [&](int64_t dim) {
      return tensor.size(dim) <= 1 || tensor.stride(dim) == 1;
    };
    const bool is_contiguous = argument.memory == Memory::kContiguous || last < 0
                                   ? tensor.is_contiguous()
                                   : is_dense(last) || (argument.memory == Memory::kMatrix &&
                                                        tensor.is_cuda() && is_dense(last - 1));
    if (!is_contiguous) {
      fail(argument.name, " must ",
           argument.memory == Memory::kContiguous ? "be contiguous" : "have contiguous rows",
           ", got strides ", list(tensor.strides()), " for shape ", list(tensor.sizes()));
    }
  }

  template <typename... Parts>
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... sentence) const {
    std::ostringstream text;
    text << op_ << ": ";
    (text << ... << sentence);
    throw std::invalid_argument(text.str());
  }

  [[noreturn, gnu::cold, gnu::noinline]] void fail_shape(const char* name, const Tensor& tensor,
                                                         std::initializer_list<Dim> dims) const {
    std::ostringstream names, sizes;
    bool has_sizes = false;
    for (const Dim& dim : dims) {
      const char* separator = &dim == dims.begin() ? "" : ", ";
      names << separator << dim.name;
      sizes << separator << (dim.size == kAnySize ? "any" : std::to_string(dim.size));
      has_sizes = has_sizes || dim.size != kAnySize;
    }
    fail(name, " must be [", names.str(), "]", has_sizes ? " = [" + sizes.str() + "]" : "",
         ", got ", list(tensor.sizes()));
  }

  static std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
    std::ostringstream text;
    for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "[") << values[i];
    return text.str() + (values.empty() ? "[]" : "]");
  }

  static std::string device_name(const Tensor& tensor) {
    if (tensor.is_cpu()) return "cpu";
    const std::string index = std::to_string(tensor.get_device_index());
    return (tensor.is_cuda() ? "cuda:" : "another device, index ") + index;
  }

  static ScalarType scalar_type(Type type) {
    switch (type) {
      case Type::kBool: return ScalarType::Bool;
      case Type::kInt32: return ScalarType::Int;
      case Type::kInt64: return ScalarType::Long;
      case Type::kFloat64: return ScalarType::Double;
      default: return ScalarType::Float;
    }
  }

  static const char* dtype_name(ScalarType type) {
    switch (type) {  // torch's Python names where the op list uses the type, C++ names elsewhere
      case ScalarType::Bool: return "bool";
      case ScalarType::Int: return "int32";
      case ScalarType::Long: return "int64";
      case ScalarType::Half: return "float16";
      case ScalarType::BFloat16: return "bfloat16";
      case ScalarType::Float: return "float32";
      case ScalarType::Double: return "float64";
      default: return torch::headeronly::toString(type);
    }
  }
};

// Data pointers; null for an optional argument that was not given.
template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* input(const std::optional<Tensor>& tensor) {
  return tensor ? input<T>(*tensor) : nullptr;
}
template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
T* output(const std::optional<Tensor>& tensor) {
  return tensor ? output<T>(*tensor) : nullptr;
}

}  // namespace elastic_cache::ops
