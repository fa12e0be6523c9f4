// Registers the dropout family for CUDA tensors: the checks, allocations and launches of its three operators. The
// kernels are in dropout_apply.cuh and dropout_columns.cuh.

#include <tuple>
#include <vector>

#include "dropout.cuh"
#include "dropout_door.h"

namespace fastreg::cuda {
namespace {

using Optional = const std::optional<Tensor>&;

// --- what is given ---------------------------------------------------------------------------------------------------

struct Rate {
  int64_t threshold;
  Optional dynamic_threshold;
  int64_t unit;
  bool rescale;
};

DropoutMaskArguments mask_arguments(const DenseView& input, Optional seed, const Rate& rate, const char* op) {
  if (rate.unit < 0 || rate.unit > static_cast<int64_t>(Unit::Batch)) {
    fail(op, "unit must be a number from 0 to ", static_cast<int>(Unit::Batch), ", but is ", rate.unit, ".");
  }
  const Unit unit = static_cast<Unit>(rate.unit);
  const uint64_t lanes = lanes_of_unit(unit);
  check_threshold(rate.threshold, lanes, op);
  bool fits = true;
  if (unit == Unit::Channel) fits = input.dimensions >= 2 && (input.contiguous() || input.channels_last());
  if (unit == Unit::Sample) fits = input.by_samples();
  if (!fits) {
    fail(op, "input's ", unit == Unit::Channel ? "channels" : "samples",
         " must be contiguous or, of channels, channels_last; call .contiguous() on it first.");
  }
  const UnitGeometry geometry = unit_geometry(unit, input.sizes, input.dimensions,
                                              unit == Unit::Channel && !input.contiguous() && input.sizes[1] > 1);
  DropoutMaskArguments arguments{};
  arguments.seed = number_on_device(seed, input.device, op, "seed");
  arguments.dynamic_threshold = number_on_device(rate.dynamic_threshold, input.device, op, "dynamic_threshold");
  arguments.threshold = rate.threshold;
  arguments.scale = rate.rescale ? static_cast<float>(keep_scale(static_cast<uint64_t>(rate.threshold), lanes)) : 1.0f;
  arguments.unit = unit;
  arguments.rescale = rate.rescale;
  arguments.elements = divisor_of(geometry.elements);
  arguments.columns = divisor_of(larger(geometry.columns, 1));
  return arguments;
}

// A scale of rows or of columns, dtype of its own, which only a contiguous input has.
Parameter scale_of(Optional tensor, const DenseView& input, int64_t elements, const char* op, const char* name) {
  if (!tensor.has_value()) {
    return {nullptr, DType::Float32};
  }
  const VectorView view = vector_view(*tensor, elements, input.device, op, name);
  if (view.dtype == DType::Float64) {
    fail(op, name, " is float64 but input is ", name_of(input.dtype), "; float64 mixes with no other dtype.");
  }
  if (!input.contiguous()) {
    fail(op, "input must be contiguous where ", name, " is given.");
  }
  return parameter_of(view);
}

// The scales of a call, and what a position is divided by to find one.
struct Scales {
  Parameter rows{nullptr, DType::Float32};
  Parameter columns{nullptr, DType::Float32};
  int64_t row_elements = 1;
  int64_t column_count = 1;

  Scales(const DenseView& input, Optional row_scale, Optional layer_scale, const char* op) {
    if (row_scale.has_value()) {
      const auto sizes = row_scale->sizes();
      const int64_t given = static_cast<int64_t>(sizes.size());
      bool fits = given < input.dimensions;
      int64_t elements = 1;
      for (int64_t dimension = 0; fits && dimension < input.dimensions; ++dimension) {
        if (dimension < given) {
          fits = sizes[static_cast<size_t>(dimension)] == input.sizes[dimension];
          elements *= input.sizes[dimension];
        } else {
          row_elements *= input.sizes[dimension];
        }
      }
      if (!fits) {
        fail(op, "row_scale must have the first dimensions of input's shape.");
      }
      rows = scale_of(row_scale, input, elements, op, "row_scale");
    }
    if (layer_scale.has_value()) {
      if (input.dimensions < 1) {
        fail(op, "input must have at least 1 dimension where layer_scale is given.");
      }
      column_count = input.sizes[input.dimensions - 1];
      columns = scale_of(layer_scale, input, column_count, op, "layer_scale");
    }
  }
};

DropoutArguments dropout_arguments(const DenseView& input, const Scales& scales, const DropoutMaskArguments& mask,
                                   const void* residual, void* output) {
  return {.input = input.data,
          .residual = residual,
          .output = output,
          .row_scale = scales.rows,
          .layer_scale = scales.columns,
          .row_elements = divisor_of(scales.row_elements),
          .columns = divisor_of(scales.column_count),
          .elements = input.elements,
          .mask = mask};
}

// Calls visit.operator()<Input, Output>(): equal dtypes, or one of the two float32.
template <class Visit>
cudaError_t with_elements(DType input, DType output, const char* op, const Visit& visit) {
  return with_element(input, op, [&]<class Input>() {
    return with_element(output, op, [&]<class Output>() -> cudaError_t {
      if constexpr (std::is_same_v<Input, Output> || sizeof(Input) != sizeof(Output)) {
        return visit.template operator()<Input, Output>();
      } else {
        fail(op, name_of(input), " and ", name_of(output), " do not mix; one of them must be float32.");
      }
    });
  });
}

// --- forward ---------------------------------------------------------------------------------------------------------

Tensor dropout_fwd(const Tensor& input, Optional residual, Optional row_scale, Optional layer_scale, Optional seed,
                   int64_t threshold, Optional dynamic_threshold, int64_t unit, bool rescale) {
  constexpr const char* op = "dropout_fwd";
  const DenseView view = dense_view(input, op, "input");
  const Scales scales(view, row_scale, layer_scale, op);
  const DropoutMaskArguments mask = mask_arguments(view, seed, {threshold, dynamic_threshold, unit, rescale}, op);
  const void* added = nullptr;
  DType dtype = view.dtype;
  if (residual.has_value()) {
    const DenseView residual_view = dense_view(*residual, op, "residual");
    check_laid_out_as(residual_view, view, op, "residual", "input");
    if (residual_view.dtype != view.dtype && residual_view.dtype != DType::Float32) {
      fail(op, "residual must be float32 or input's ", name_of(view.dtype), ", not ", name_of(residual_view.dtype),
           ".");
    }
    added = residual_view.data;
    dtype = residual_view.dtype;
  }
  const Tensor output = new_laid_out_as(view, dtype, op);
  if (view.elements == 0) {
    return output;
  }
  const OnDevice device(view.device, op);
  const DropoutArguments arguments = dropout_arguments(view, scales, mask, added, data_of(output, op));
  const cudaError_t error = with_elements(view.dtype, dtype, op, [&]<class Input, class Output>() -> cudaError_t {
    return launch_dropout<Input, Output>(arguments, device.stream());
  });
  check_cuda(error, op, "launch");
  return output;
}

void dropout_inplace(const Tensor& input, const Tensor& seed, int64_t threshold, Optional dynamic_threshold,
                     int64_t unit, bool rescale) {
  constexpr const char* op = "dropout_inplace";
  const DenseView view = dense_view(input, op, "input");
  const Scales scales(view, std::nullopt, std::nullopt, op);
  const DropoutMaskArguments mask = mask_arguments(view, seed, {threshold, dynamic_threshold, unit, rescale}, op);
  if (view.elements == 0) {
    return;
  }
  const OnDevice device(view.device, op);
  const DropoutArguments arguments = dropout_arguments(view, scales, mask, nullptr, data_of(input, op));
  const cudaError_t error = with_element(
      view.dtype, op, [&]<class Element>() { return launch_dropout<Element, Element>(arguments, device.stream()); });
  check_cuda(error, op, "launch");
}

// --- backward --------------------------------------------------------------------------------------------------------

DType dtype_of_number(int64_t number, const char* op) {
  if (number < 0 || number > static_cast<int64_t>(DType::Float64)) {
    fail(op, "input_dtype must be a number from 0 to ", static_cast<int>(DType::Float64), ", but is ", number, ".");
  }
  return static_cast<DType>(number);
}

// Both gradients in one pass over the rows; grad_input is null where it is not asked for.
void launch_with_sums(const DenseView& grad_output, const DenseView& input, const Scales& scales,
                      const DropoutMaskArguments& mask, void* grad_input, void* grad_layer_scale, const char* op) {
  const OnDevice device(grad_output.device, op);
  DropoutColumnsArguments arguments{.grad_output = grad_output.data,
                                    .input = input.data,
                                    .grad_input = grad_input,
                                    .row_scale = scales.rows,
                                    .layer_scale = scales.columns,
                                    .partials = nullptr,
                                    .row_elements = divisor_of(scales.row_elements),
                                    .rows = grad_output.elements / larger(scales.column_count, 1),
                                    .columns = scales.column_count,
                                    .mask = mask,
                                    .plan = {}};
  // Lives until the kernels are launched; torch's allocator reuses it for later work of the same stream only.
  std::optional<Tensor> partials;
  if (grad_output.elements > 0) {
    const auto launched = [&]<class Gradient, class Element>() -> cudaError_t {
      if constexpr (sizeof(Gradient) < sizeof(Element)) {
        fail(op, "grad_output must not be narrower than input.");
      } else {
        const int width = dropout_columns_width<Gradient, Element>(arguments);
        arguments.plan =
            dropout_columns_plan(arguments.rows, arguments.columns, width, device.traits().multiprocessors);
        partials = new_vector(arguments.plan.parts * arguments.columns, DType::Float32, grad_output.device, op);
        arguments.partials = static_cast<float*>(data_of(*partials, op));
        return launch_dropout_columns<Gradient, Element>(arguments, device.stream());
      }
    };
    check_cuda(with_elements(grad_output.dtype, input.dtype, op, launched), op, "launch");
  }
  const DropoutPartialsArguments sums{arguments.partials, scales.columns, grad_layer_scale, arguments.plan.parts,
                                      arguments.columns};
  check_cuda(launch_dropout_partials(sums, device.stream()), op, "launch");
}

std::tuple<Tensor, Tensor> dropout_bwd(const Tensor& grad_output, Optional input, Optional row_scale,
                                       Optional layer_scale, Optional seed, int64_t threshold,
                                       Optional dynamic_threshold, int64_t unit, bool rescale, int64_t input_dtype,
                                       std::vector<bool> output_mask) {
  constexpr const char* op = "dropout_bwd";
  const bool wants_input = output_mask.at(0);
  const bool wants_scale = output_mask.at(1);
  const DType dtype = dtype_of_number(input_dtype, op);
  const DenseView view = dense_view(grad_output, op, "grad_output");
  if (view.dtype != dtype && view.dtype != DType::Float32) {
    fail(op, "grad_output must be float32 or input's ", name_of(dtype), ", not ", name_of(view.dtype), ".");
  }
  const Scales scales(view, row_scale, layer_scale, op);
  const DropoutMaskArguments mask = mask_arguments(view, seed, {threshold, dynamic_threshold, unit, rescale}, op);
  std::optional<DenseView> input_view;
  if (wants_scale) {
    if (!layer_scale.has_value() || !input.has_value()) {
      fail(op, "output_mask asks for the gradient of layer_scale, for which layer_scale and input must be given.");
    }
    input_view = dense_view(*input, op, "input");
    check_laid_out_as(*input_view, view, op, "input", "grad_output");
    if (input_view->dtype != dtype) {
      fail(op, "input must be ", name_of(dtype), ", as input_dtype says.");
    }
  }
  const Tensor grad_input = wants_input ? new_laid_out_as(view, dtype, op) : empty_gradient(dtype, view.device, op);
  const Tensor grad_layer_scale =
      new_vector(wants_scale ? scales.column_count : 0, layer_scale.has_value() ? scales.columns.dtype : view.dtype,
                 view.device, op);
  if (wants_scale && scales.column_count > 0) {
    launch_with_sums(view, *input_view, scales, mask, wants_input ? data_of(grad_input, op) : nullptr,
                     data_of(grad_layer_scale, op), op);
  } else if (wants_input && view.elements > 0) {
    const OnDevice device(view.device, op);
    const DropoutArguments arguments = dropout_arguments(view, scales, mask, nullptr, data_of(grad_input, op));
    const cudaError_t error = with_elements(view.dtype, dtype, op, [&]<class Gradient, class Element>() -> cudaError_t {
      return launch_dropout<Gradient, Element>(arguments, device.stream());
    });
    check_cuda(error, op, "launch");
  }
  return {grad_input, grad_layer_scale};
}

}  // namespace
}  // namespace fastreg::cuda

FASTREG_CUDA_LIBRARY_IMPL(m) {
  m.impl("dropout_fwd", TORCH_BOX(&fastreg::cuda::dropout_fwd));
  m.impl("dropout_inplace", TORCH_BOX(&fastreg::cuda::dropout_inplace));
  m.impl("dropout_bwd", TORCH_BOX(&fastreg::cuda::dropout_bwd));
}
