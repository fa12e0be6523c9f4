// What the doors of dropout's operators share: the view of a dense tensor, the mask and the scales as the kernels take
// them, and the split among threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <tuple>

#include "../units.h"
#include "door.h"
#include "dropout.h"

namespace fastreg {

// --- arguments ---------------------------------------------------------------------------------------------

// A tensor whose elements fill a stretch of memory, in whatever order.
struct DenseView {
  const void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dimensions;
  int64_t elements;
  DType dtype;
  Device device;

  // Whether these dimensions, from the outermost to the innermost, are laid out without gaps.
  template <class Order>
  bool is_laid_out(const Order& order) const {
    int64_t stride = 1;
    for (int64_t place = dimensions - 1; place >= 0; --place) {
      const int64_t dimension = order(place);
      if (sizes[dimension] != 1) {
        if (strides[dimension] != stride) {
          return false;
        }
        stride *= sizes[dimension];
      }
    }
    return true;
  }

  bool is_contiguous() const {
    return elements == 0 || is_laid_out([](int64_t place) { return place; });
  }

  bool is_channels_last() const {
    return is_laid_out([&](int64_t place) { return place == 0 ? 0 : place == dimensions - 1 ? 1 : place + 1; });
  }

  bool is_dense() const {
    if (is_contiguous()) {
      return true;
    }
    int64_t order[maximum_dimensions];
    std::iota(order, order + dimensions, int64_t{0});
    std::sort(order, order + dimensions, [&](int64_t left, int64_t right) {
      return std::tuple(strides[left], sizes[left]) > std::tuple(strides[right], sizes[right]);
    });
    return is_laid_out([&](int64_t place) { return order[place]; });
  }

  int64_t last_size() const { return dimensions == 0 ? 1 : sizes[dimensions - 1]; }
};

inline DenseView dense_view(const Tensor& tensor, const char* op, const char* name) {
  DenseView view{};
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  check_call(aoti_torch_get_dim(tensor.get(), &view.dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(tensor.get(), &sizes), op, "read sizes");
  check_call(aoti_torch_get_strides(tensor.get(), &strides), op, "read strides");
  view.sizes = sizes;
  view.strides = strides;
  check_call(torch_get_const_data_ptr(tensor.get(), &view.data), op, "read a data pointer");
  view.dtype = dtype_of(tensor, op, name);
  view.device = device_of(tensor, op);
  if (view.dimensions > maximum_dimensions) {
    fail(op, name, " must have ", maximum_dimensions, " dimensions at most, but has ", view.dimensions, ".");
  }
  view.elements = 1;
  for (int64_t dimension = 0; dimension < view.dimensions; ++dimension) {
    view.elements *= sizes[dimension];
  }
  if (!view.is_dense()) {
    fail(op, name, " must fill its memory without gaps or overlaps; call .contiguous() on it first.");
  }
  return view;
}

// A second tensor that is walked through with the first.
inline DenseView view_like(const Tensor& tensor, const DenseView& first, const char* first_name, const char* op,
                    const char* name) {
  const DenseView view = dense_view(tensor, op, name);
  bool same = view.dimensions == first.dimensions && view.device == first.device;
  for (int64_t dimension = 0; same && dimension < first.dimensions; ++dimension) {
    same = view.sizes[dimension] == first.sizes[dimension] &&
           (first.elements == 0 || first.sizes[dimension] == 1 ||
            view.strides[dimension] == first.strides[dimension]);
  }
  if (!same) {
    fail(op, name, " must have the shape, strides and device of ", first_name, ".");
  }
  return view;
}

inline int64_t read_integer(const Tensor& tensor, const Device& device, const char* op, const char* name) {
  int64_t elements = 0;
  int32_t dtype = -1;
  const void* data = nullptr;
  check_call(aoti_torch_get_numel(tensor.get(), &elements), op, "read a size");
  check_call(aoti_torch_get_dtype(tensor.get(), &dtype), op, "read a dtype");
  check_call(torch_get_const_data_ptr(tensor.get(), &data), op, "read a data pointer");
  if (elements != 1 || dtype != aoti_torch_dtype_int64() || !(device_of(tensor, op) == device)) {
    fail(op, name, " must be one int64 on input's device.");
  }
  return *static_cast<const int64_t*>(data);
}

// What decides about the mask, as the operators take it.
struct [[gnu::visibility("hidden")]] MaskArguments {
  const std::optional<Tensor>& seed;
  int64_t threshold;
  const std::optional<Tensor>& dynamic_threshold;
  int64_t unit;
  bool rescale;
};

// --- masks -------------------------------------------------------------------------------------------------

inline Unit unit_of(const DenseView& input, int64_t number, const char* op) {
  if (number < 0 || number > static_cast<int64_t>(Unit::Batch)) {
    fail(op, "unit must be 0 (element), 1 (channel), 2 (sample) or 3 (batch), but is ", number, ".");
  }
  const Unit unit = static_cast<Unit>(number);
  if (unit == Unit::Channel) {
    if (input.dimensions < 2) {
      fail(op, "input must have at least 2 dimensions for a mask of channels, but has ", input.dimensions, ".");
    }
    if (!input.is_contiguous() && !input.is_channels_last()) {
      fail(op, "input must be contiguous or channels_last for a mask of channels; call .contiguous() on it first.");
    }
  }
  if (unit == Unit::Sample) {
    if (input.dimensions < 1) {
      fail(op, "input must have a dimension for a mask of samples, but has none.");
    }
    const int64_t samples = input.sizes[0];
    if (input.elements > 0 && samples > 1 && input.strides[0] * samples != input.elements) {
      fail(op, "input's first dimension must be the outermost in memory for a mask of samples; call .contiguous() on "
               "it first.");
    }
  }
  return unit;
}

// The mask, with the patterns that it points to.
class [[gnu::visibility("hidden")]] MaskProblem {
 public:
  MaskProblem(const DenseView& input, const MaskArguments& arguments, const char* op) {
    const Unit unit = unit_of(input, arguments.unit, op);
    const int64_t lanes = static_cast<int64_t>(lanes_of_unit(unit));
    int64_t threshold = arguments.threshold;
    if (threshold < 0 || threshold > lanes) {
      fail(op, "threshold must be between 0 and ", lanes, ", but is ", threshold, ".");
    }
    if (arguments.dynamic_threshold.has_value()) {
      threshold = read_integer(*arguments.dynamic_threshold, input.device, op, "dynamic_threshold");
      threshold = std::clamp<int64_t>(threshold, 0, lanes);
    }
    if (!arguments.seed.has_value()) {
      return;
    }
    mask_.seed = static_cast<uint64_t>(read_integer(*arguments.seed, input.device, op, "seed"));
    if (arguments.rescale) {
      scale_ = keep_scale(static_cast<uint64_t>(threshold), static_cast<uint64_t>(lanes));
    }
    if (threshold == 0 || threshold == lanes || input.elements == 0) {
      mask_.rule = threshold == lanes ? KeepRule::none : KeepRule::all;
      return;
    }
    mask_.threshold = static_cast<uint32_t>(threshold);
    if (unit == Unit::Element) {
      mask_.rule = KeepRule::elements;
      return;
    }
    const UnitGeometry geometry =
        unit_geometry(unit, input.sizes, input.dimensions, !input.is_contiguous() && input.sizes[1] > 1);
    mask_.rule = geometry.columns == 1 ? KeepRule::runs : KeepRule::patterns;
    mask_.run = geometry.elements;
    if (mask_.rule == KeepRule::patterns) {
      make_patterns(geometry, input.elements / geometry.elements);
    }
  }

  const DropoutMask& mask() const { return mask_; }
  double scale() const { return scale_; }

 private:
  // Channels of a sample that are worked on at a time: few are repeated, so that loops have a length.
  static constexpr int64_t least_pattern = 512;

  void make_patterns(const UnitGeometry& geometry, int64_t samples) {
    const int64_t channels = geometry.columns;
    const int64_t pattern = channels * parts_of(least_pattern, channels);
    const int64_t elements = samples * pattern;
    // Kernels read whole vectors of them.
    uint16_t* const patterns = static_cast<uint16_t*>(
        patterns_.reserve((elements + cache_line) * static_cast<int64_t>(sizeof(uint16_t))));
    UnitPatterns* const fill = FASTREG_SIMD_VARIANT(unit_patterns);
    split(samples, thread_count(elements), [&](int64_t begin, int64_t end) {
      fill(mask_.seed, mask_.threshold, channels, pattern, patterns, begin, end);
    });
    mask_.patterns = patterns;
    mask_.pattern = pattern;
    mask_.sample = geometry.elements;
  }

  Scratch patterns_;
  DropoutMask mask_{.rule = KeepRule::all,
                    .seed = 0,
                    .threshold = 0,
                    .run = 1,
                    .patterns = nullptr,
                    .pattern = 1,
                    .sample = 1};
  double scale_ = 1;
};

// --- scales ------------------------------------------------------------------------------------------------

inline VectorView scale_view(const Tensor& tensor, int64_t elements, const DenseView& input, const char* op,
                      const char* name) {
  const VectorView view = vector_view(tensor, elements, input.device, op, name);
  if ((view.dtype == DType::Float64) != (input.dtype == DType::Float64)) {
    fail(op, name, " is ", name_of(view.dtype), " but input is ", name_of(input.dtype),
         "; float64 mixes with no other dtype.");
  }
  if (!input.is_contiguous()) {
    fail(op, "input must be contiguous where ", name, " is given; call .contiguous() on it first.");
  }
  return view;
}

// `whole_rows`: there is a layer_scale too, and one row has one row_scale.
inline VectorView row_scale_view(const std::optional<Tensor>& tensor, bool whole_rows, const DenseView& input,
                                 const char* op) {
  if (!tensor.has_value()) {
    return {};
  }
  int64_t dimensions = 0;
  int64_t* sizes = nullptr;
  check_call(aoti_torch_get_dim(tensor->get(), &dimensions), op, "read a dimension");
  check_call(aoti_torch_get_sizes(tensor->get(), &sizes), op, "read sizes");
  if (dimensions > input.dimensions - (whole_rows ? 1 : 0) || !std::equal(sizes, sizes + dimensions, input.sizes)) {
    fail(op, "row_scale must have the first dimensions of input's shape", whole_rows ? ", without the last." : ".");
  }
  const int64_t rows = std::accumulate(sizes, sizes + dimensions, int64_t{1}, std::multiplies<>());
  return scale_view(*tensor, rows, input, op, "row_scale");
}

inline VectorView layer_scale_view(const std::optional<Tensor>& tensor, const DenseView& input, const char* op) {
  return tensor.has_value() ? scale_view(*tensor, input.last_size(), input, op, "layer_scale") : VectorView{};
}

inline int64_t elements_of(const std::optional<Tensor>& tensor, const char* op) {
  int64_t elements = 0;
  if (tensor.has_value()) {
    check_call(aoti_torch_get_numel(tensor->get(), &elements), op, "read a size");
  }
  return elements;
}

// Scales as the kernels want them.
struct [[gnu::visibility("hidden")]] Scales {
  Scales(const std::optional<Tensor>& row_scale, const std::optional<Tensor>& layer_scale, const DenseView& input,
         const char* op)
      : layer(layer_scale_view(layer_scale, input, op)),
        row_count(elements_of(row_scale, op)),
        row_values(row_scale_view(row_scale, layer.given, input, op), row_count),
        layer_values(layer, input.last_size()) {}

  void give(Dropout& dropout) const {
    dropout.row_scale = row_values.data();
    dropout.row = row_count == 0 ? dropout.elements : dropout.elements / row_count;
    dropout.layer_scale = layer_values.data();
  }

  VectorView layer;
  int64_t row_count;
  ParameterRow row_values;
  ParameterRow layer_values;
};

// --- running -----------------------------------------------------------------------------------------------

inline const DropoutKernels& kernels_for(DType input, DType output) {
  return FASTREG_SIMD_VARIANT(dropout_kernels)[static_cast<int>(input)][static_cast<int>(output)];
}

inline Dropout dropout_of(const DenseView& input, const MaskProblem& problem) {
  Dropout dropout{};
  dropout.mask = problem.mask();
  dropout.scale = problem.scale();
  dropout.input = input.data;
  dropout.elements = input.elements;
  dropout.row = input.elements;
  dropout.columns = input.last_size();
  return dropout;
}

inline void run(const Dropout& dropout, DType input, DType output) {
  const DropoutKernels& kernels = kernels_for(input, output);
  split(parts_of(dropout.elements, dropout_tile), thread_count(dropout.elements), [&](int64_t begin, int64_t end) {
    kernels.apply(dropout, begin * dropout_tile, std::min(end * dropout_tile, dropout.elements));
  });
}

inline Tensor new_output(const DenseView& like, DType dtype, const char* op) {
  return new_output(like.sizes, like.strides, like.dimensions, dtype, like.device, op);
}

}  // namespace fastreg
