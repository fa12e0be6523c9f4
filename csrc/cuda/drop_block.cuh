// Launchers of DropBlock: raw pointers, no torch type. The kernels are in drop_block_mask.cuh and drop_block_apply.cuh.

#pragma once

#include "drop_block_apply.cuh"
#include "drop_block_mask.cuh"
#include "launch.cuh"

namespace fastreg::cuda {

// `arguments` without its plan and divisors; `arguments.seeds` has room for shape.seed_words words.
inline cudaError_t launch_drop_block_mask(DropBlockMaskArguments arguments, cudaStream_t stream) {
  const DropBlockShape& shape = arguments.shape;
  const int64_t words = larger(shape.seed_words, shape.samples);
  const Launch seeds{divide_up(words, drop_block_threads), drop_block_threads, 1, 0, false, stream};
  const cudaError_t error = launch<drop_block_seeds_kernel>(seeds, arguments);
  if (error != cudaSuccess || shape.sample_words == 0) {
    return error;
  }
  arguments.plan = drop_block_grow_plan(shape);
  arguments.row_words = divisor_of(shape.row_words);
  arguments.row_of_depth = divisor_of(shape.sizes[1]);
  arguments.depth_of_plane = divisor_of(shape.sizes[0]);
  return launch<drop_block_grow_kernel>(
      Launch{shape.samples * arguments.plan.sample_blocks, arguments.plan.threads, 1, 0, false, stream}, arguments);
}

// Packs need both pointers to be multiples of 16 bytes, and a sample of whole packs where samples have scales.
template <class Element>
cudaError_t launch_drop_block_apply(const DropBlockApplyArguments& arguments, cudaStream_t stream) {
  constexpr int wide = full_width<Element>;
  const auto with_width = [&]<int width>() {
    const int64_t blocks = divide_up(arguments.elements, int64_t{drop_block_threads} * drop_block_packs * width);
    return launch<drop_block_apply_kernel<Element, width>>(Launch{blocks, drop_block_threads, 1, 0, false, stream},
                                                           arguments);
  };
  const bool fits = aligned(arguments.input, 16) && aligned(arguments.output, 16) &&
                    (!arguments.per_sample || arguments.sample_elements.value % wide == 0);
  return fits ? with_width.template operator()<wide>() : with_width.template operator()<1>();
}

}  // namespace fastreg::cuda
