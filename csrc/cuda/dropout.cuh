// Launchers of the dropout family: raw pointers, no torch type. The kernels are in dropout_apply.cuh and
// dropout_columns.cuh, what they are laid out by is in dropout_plan.h.

#pragma once

#include "dropout_apply.cuh"
#include "dropout_columns.cuh"
#include "launch.cuh"

namespace fastreg::cuda {

// Whether a pack of a parameter, as many elements as one of the activations, can be loaded at once.
inline bool wide_scale(const Parameter& scale, const Divisor& columns, int width) {
  const uintptr_t bytes = static_cast<uintptr_t>(width * element_size(scale.dtype));
  return scale.data == nullptr || (columns.value % width == 0 && aligned(scale.data, bytes < 16 ? bytes : 16));
}

template <class Element>
bool wide_tensor(const void* data, int width) {
  return data == nullptr || aligned(data, sizeof(Element) * static_cast<uintptr_t>(width));
}

// Packs need every pointer to be a multiple of them, and rows to be whole packs.
template <class Input, class Output>
bool wide_elements(const DropoutArguments& arguments, int width) {
  return wide_tensor<Input>(arguments.input, width) && wide_tensor<Output>(arguments.residual, width) &&
         wide_tensor<Output>(arguments.output, width) &&
         (arguments.row_scale.data == nullptr || arguments.row_elements.value % width == 0) &&
         wide_scale(arguments.layer_scale, arguments.columns, width);
}

template <class Input, class Output>
cudaError_t launch_dropout(const DropoutArguments& arguments, cudaStream_t stream) {
  constexpr int width = dropout_width(sizeof(Input), sizeof(Output));
  const auto with_width = [&]<int chosen>() {
    const Launch shape{dropout_blocks(arguments.elements, chosen), dropout_threads, 1, 0, false, stream};
    const bool units = arguments.mask.seed != nullptr && arguments.mask.unit != Unit::Element;
    return units ? launch<dropout_units_kernel<Input, Output, chosen>>(shape, arguments)
                 : launch<dropout_elements_kernel<Input, Output, chosen>>(shape, arguments);
  };
  return wide_elements<Input, Output>(arguments, width) ? with_width.template operator()<width>()
                                                        : with_width.template operator()<1>();
}

// --- with the gradient of layer_scale --------------------------------------------------------------------------------

// What a caller has to know before it allocates the partial sums. Rows are whole packs where they can be.
template <class Gradient, class Element>
int dropout_columns_width(const DropoutColumnsArguments& arguments) {
  constexpr int width = dropout_width(sizeof(Gradient), sizeof(Element));
  const bool wide = wide_tensor<Gradient>(arguments.grad_output, width) &&
                    wide_tensor<Element>(arguments.input, width) && wide_tensor<Element>(arguments.grad_input, width) &&
                    arguments.columns % width == 0 &&
                    wide_scale(arguments.layer_scale, {arguments.columns, 0, 0}, width);
  return wide ? width : 1;
}

template <class Gradient, class Element>
cudaError_t launch_dropout_columns(const DropoutColumnsArguments& arguments, cudaStream_t stream) {
  constexpr int width = dropout_width(sizeof(Gradient), sizeof(Element));
  const Launch shape{arguments.plan.blocks(), arguments.plan.threads(), 1, 0, false, stream};
  return dropout_columns_width<Gradient, Element>(arguments) == 1
             ? launch<dropout_columns_kernel<Gradient, Element, 1>>(shape, arguments)
             : launch<dropout_columns_kernel<Gradient, Element, width>>(shape, arguments);
}

inline cudaError_t launch_dropout_partials(const DropoutPartialsArguments& arguments, cudaStream_t stream) {
  const int64_t blocks = divide_up(arguments.columns, dropout_partials_columns);
  return launch<dropout_partials_kernel>(
      Launch{blocks, dropout_partials_columns * dropout_partials_slices, 1, 0, false, stream}, arguments);
}

}  // namespace fastreg::cuda
