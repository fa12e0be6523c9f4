// The kernels of the dropout family and of DropBlock against their definitions, without torch; as standalone.cpp, with
// the same arguments and exit code. Units and blocks are counted here by the coordinates of an element, not by its
// place in memory.

#include <vector>

#include "drop_block.cuh"
#include "dropout.cuh"
#include "standalone.h"

namespace {

using fastreg::Unit;

constexpr uint64_t seed_value = 0x0123456789abcdef;

// Integers in memory of their own.
template <class Number>
struct Numbers {
  std::unique_ptr<void, decltype(&release)> memory;
  Number* data;

  explicit Numbers(int64_t count) : memory(nullptr, &release), data(nullptr) {
    memory.reset(allocate(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(Number), sizeof(Number)));
    data = static_cast<Number*>(memory.get());
  }

  Numbers(std::initializer_list<Number> values) : Numbers(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data);
    simulator::tracer::initialised(data, values.size() * sizeof(Number));
  }
};

template <class Value>
void require_same(const char* name, Value actual, Value exact) {
  if (actual != exact) {
    throw std::runtime_error(std::string(name) + " is " + std::to_string(actual) + ", exact " + std::to_string(exact));
  }
}

// --- dropout ---------------------------------------------------------------------------------------------------------

// (samples, channels, spatial), contiguous or channels_last.
struct Case {
  Unit unit;
  int architecture;
  int multiprocessors;
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  bool channels_last;
  bool scales;  // one a sample, one an index of the last dimension, and a residual
  bool dynamic;
  int64_t shift;  // of the first element, in elements
};

std::string describe(const Case& current) {
  constexpr const char* units[] = {"elements", "channels", "samples", "the batch"};
  return std::string(units[static_cast<int>(current.unit)]) + " of " + std::to_string(current.samples) + " x " +
         std::to_string(current.channels) + " x " + std::to_string(current.spatial) +
         (current.channels_last ? " channels_last" : "") + (current.scales ? " with scales" : "") +
         (current.dynamic ? ", dynamic" : "") + ", shift " + std::to_string(current.shift);
}

bool is_kept(const Case& current, int64_t position, uint64_t threshold) {
  const int64_t sample = position / (current.channels * current.spatial);
  const int64_t rest = position % (current.channels * current.spatial);
  const int64_t channel = current.channels_last ? rest % current.channels : rest / current.spatial;
  const int64_t units[] = {position, sample * current.channels + channel, sample, 0};
  const uint64_t unit = static_cast<uint64_t>(units[static_cast<int>(current.unit)]);
  return (current.unit == Unit::Element ? fastreg::half_lane_at(seed_value, unit)
                                        : fastreg::lane_at(seed_value, unit)) >= threshold;
}

template <class Input, class Output>
struct Tensors {
  Case current;
  int64_t elements, columns;
  uint64_t threshold;
  double scale;
  Matrix<Input> input, grad_input;
  Matrix<Output> residual, output;  // and grad_output, which is the residual's
  Matrix<bfloat16> row_scale;
  Matrix<float> layer_scale, grad_layer_scale;
  Numbers<int64_t> seed, limit;

  explicit Tensors(const Case& current)
      : current(current),
        elements(current.samples * current.channels * current.spatial),
        columns(current.spatial),
        threshold(fastreg::lanes_of_unit(current.unit) / 10 * 3),
        scale(fastreg::keep_scale(threshold, fastreg::lanes_of_unit(current.unit))),
        input(1, elements, 0, current.shift),
        grad_input(1, elements, 0, current.shift),
        residual(1, elements, 0, current.shift),
        output(1, elements, 0, current.shift),
        row_scale(1, current.samples),
        layer_scale(1, columns),
        grad_layer_scale(1, columns),
        seed{static_cast<int64_t>(seed_value)},
        limit{static_cast<int64_t>(threshold)} {
    std::mt19937_64 random(static_cast<uint64_t>(elements));
    input.fill(random, 1.0, 1.0);
    residual.fill(random, 0.0, 1.0);
    row_scale.fill(random, 1.0, 0.25);
    layer_scale.fill(random, 1.0, 0.25);
  }

  DropoutMaskArguments mask() const {
    const int64_t sizes[] = {current.samples, current.channels, current.spatial};
    const fastreg::UnitGeometry geometry = fastreg::unit_geometry(current.unit, sizes, 3, current.channels_last);
    return {.seed = seed.data,
            .dynamic_threshold = current.dynamic ? limit.data : nullptr,
            .threshold = current.dynamic ? 0 : static_cast<int64_t>(threshold),
            .scale = static_cast<float>(scale),
            .unit = current.unit,
            .rescale = true,
            .elements = divisor_of(geometry.elements),
            .columns = divisor_of(geometry.columns)};
  }

  Parameter rows() const { return {current.scales ? row_scale.data : nullptr, DType::BFloat16}; }
  Parameter layers() const { return {current.scales ? layer_scale.data : nullptr, DType::Float32}; }

  // What a kept element is multiplied by, or 0; without the layer's scale.
  double factor(int64_t position) {
    if (!is_kept(current, position, threshold)) return 0.0;
    return current.scales ? scale * row_scale.value(0, position / (current.channels * columns)) : scale;
  }
  double of_layer(int64_t position) { return current.scales ? layer_scale.value(0, position % columns) : 1.0; }

  void forward() {
    require(launch_dropout<Input, Output>({.input = input.data,
                                           .residual = current.scales ? residual.data : nullptr,
                                           .output = output.data,
                                           .row_scale = rows(),
                                           .layer_scale = layers(),
                                           .row_elements = divisor_of(current.channels * columns),
                                           .columns = divisor_of(columns),
                                           .elements = elements,
                                           .mask = mask()},
                                          nullptr));
    for (int64_t position = 0; position < elements; ++position) {
      const double product = input.value(0, position) * factor(position) * of_layer(position);
      const double added = current.scales ? residual.value(0, position) : 0.0;
      require_close<Output>("output", output.value(0, position), product + added, std::abs(product) + std::abs(added));
    }
  }

  // Both gradients at once.
  void backward(const DeviceTraits& device) {
    DropoutColumnsArguments arguments{.grad_output = residual.data,
                                      .input = input.data,
                                      .grad_input = grad_input.data,
                                      .row_scale = rows(),
                                      .layer_scale = layers(),
                                      .partials = nullptr,
                                      .row_elements = divisor_of(current.channels * columns),
                                      .rows = elements / columns,
                                      .columns = columns,
                                      .mask = mask(),
                                      .plan = {}};
    const int width = dropout_columns_width<Output, Input>(arguments);
    arguments.plan = dropout_columns_plan(arguments.rows, columns, width, device.multiprocessors);
    const int64_t parts = arguments.plan.parts;
    Matrix<float> partials(parts, columns);
    arguments.partials = partials.data;
    require(launch_dropout_columns<Output, Input>(arguments, nullptr));
    require(launch_dropout_partials({partials.data, layers(), grad_layer_scale.data, parts, columns}, nullptr));
    std::vector<double> exact(static_cast<size_t>(columns)), terms(exact);
    for (int64_t position = 0; position < elements; ++position) {
      const double scaled = residual.value(0, position) * factor(position);
      const double of_input = scaled * of_layer(position), term = scaled * input.value(0, position);
      require_close<Input>("grad_input", grad_input.value(0, position), of_input, std::abs(of_input));
      exact[static_cast<size_t>(position % columns)] += term;
      terms[static_cast<size_t>(position % columns)] += std::abs(term);
    }
    for (int64_t column = 0; column < columns; ++column) {
      require_close<float>("grad_layer_scale", grad_layer_scale.value(0, column), exact[static_cast<size_t>(column)],
                           terms[static_cast<size_t>(column)]);
    }
  }
};

template <class Input, class Output>
void run_case(const Case& current, const DeviceTraits& device) {
  Tensors<Input, Output> tensors(current);
  tensors.forward();
  // A gradient is as wide as the input, or wider.
  if constexpr (sizeof(Output) >= sizeof(Input)) {
    if (current.scales) tensors.backward(device);
  }
}

// Whole tiles and what is left of one; units that end within packs, of one element, in turns and across samples; the
// same one by one, of tensors that are not aligned; scales with rows of whole packs and without. Sums of several rows a
// block, strips and parts, the last ones not full.
constexpr Case cases[] = {
    {Unit::Element, 90, 2, 3, 5, 301, false, false, false, 0},
    {Unit::Element, 90, 2, 3, 5, 301, false, false, true, 1},
    {Unit::Channel, 90, 2, 3, 11, 49, false, false, true, 0},
    {Unit::Channel, 90, 2, 5, 127, 1, false, false, false, 0},
    {Unit::Channel, 90, 2, 3, 24, 49, true, false, false, 0},
    {Unit::Channel, 90, 2, 5, 9, 19, true, false, true, 1},
    {Unit::Sample, 90, 2, 9, 7, 13, false, false, false, 0},
    {Unit::Batch, 90, 2, 3, 5, 301, false, false, false, 0},
    {Unit::Element, 90, 2, 37, 7, 24, false, true, true, 0},
    {Unit::Sample, 90, 1, 9, 3, 2056, false, true, false, 0},
    {Unit::Element, 90, 2, 21, 4, 19, false, true, false, 0},
    {Unit::Channel, 90, 2, 7, 5, 304, false, true, true, 1},
};

// --- DropBlock -------------------------------------------------------------------------------------------------------

struct BlockCase {
  int architecture;
  int multiprocessors;
  int64_t samples;
  int64_t channels;
  int64_t sizes[3];
  int64_t blocks[3];
  bool anywhere;
  bool shared;  // one mask for all channels, and one scale for all samples
  bool channels_last;
};

std::string describe(const BlockCase& current) {
  const auto listed = [](const int64_t (&sizes)[3]) {
    return std::to_string(sizes[0]) + " x " + std::to_string(sizes[1]) + " x " + std::to_string(sizes[2]);
  };
  return std::to_string(current.samples) + " x " + std::to_string(current.channels) + " x " + listed(current.sizes) +
         (current.channels_last ? " channels_last" : "") + ", blocks of " + listed(current.blocks) +
         (current.anywhere ? " anywhere" : "") + (current.shared ? ", shared" : "");
}

// Of a plane, 1 where no block covers a position.
std::vector<int> kept_of_plane(const DropBlockShape& shape, int64_t plane, uint64_t threshold) {
  const auto& [depth, height, width] = shape.sizes;
  std::vector<int> kept(static_cast<size_t>(depth * height * width), 1);
  for (int64_t place = 0; place < shape.plane_seeds; ++place) {
    if (fastreg::lane_at(seed_value, static_cast<uint64_t>(plane * shape.plane_seeds + place)) >= threshold) continue;
    const int64_t at[] = {place / (shape.places[1] * shape.places[2]), place / shape.places[2] % shape.places[1],
                          place % shape.places[2]};
    for (int64_t position = 0; position < depth * height * width; ++position) {
      const int64_t of[] = {position / (height * width), position / width % height, position % width};
      bool covered = true;
      for (int dimension = 0; dimension < 3; ++dimension) {
        const int64_t first = at[dimension] - shape.before[dimension];
        covered = covered && of[dimension] >= first && of[dimension] < first + shape.blocks[dimension];
      }
      if (covered) kept[static_cast<size_t>(position)] = 0;
    }
  }
  return kept;
}

void make_mask(const BlockCase& current, const DropBlockShape& shape, uint64_t threshold, unsigned char* bits) {
  const Numbers<int64_t> seed{static_cast<int64_t>(seed_value)}, limit{static_cast<int64_t>(threshold)};
  const Numbers<unsigned long long> seeds(shape.seed_words), counts(shape.samples);
  DropBlockMaskArguments arguments{};
  arguments.seed = seed.data;
  arguments.dynamic_threshold = current.anywhere ? limit.data : nullptr;
  arguments.threshold = current.anywhere ? 0 : static_cast<int64_t>(threshold);
  arguments.seeds = seeds.data;
  arguments.bits = bits;
  arguments.counts = counts.data;
  arguments.shape = shape;
  require(launch_drop_block_mask(arguments, nullptr));
  for (int64_t sample = 0; sample < shape.samples; ++sample) {
    unsigned long long count = 0;
    for (int64_t plane = 0; plane < shape.planes; ++plane) {
      const std::vector<int> kept = kept_of_plane(shape, sample * shape.planes + plane, threshold);
      for (int64_t row = 0; row < shape.plane_rows; ++row) {
        const unsigned char* of_row =
            bits + ((sample * shape.planes + plane) * shape.plane_rows + row) * shape.row_bytes;
        for (int64_t position = 0; position < 8 * shape.row_bytes; ++position) {
          const bool beyond = position >= shape.sizes[2];
          const int exact = beyond ? 0 : kept[static_cast<size_t>(row * shape.sizes[2] + position)];
          require_same("a bit", of_row[position / 8] >> position % 8 & 1, exact);
          count += static_cast<unsigned long long>(exact);
        }
      }
    }
    require_same("a count", counts.data[sample], count);
  }
}

template <class Element>
void run_block_case(const BlockCase& current) {
  const int64_t planes = current.shared ? 1 : current.channels;
  const DropBlockShape shape =
      drop_block_shape(current.samples, planes, current.sizes, current.blocks, 3, current.anywhere);
  const uint64_t threshold = fastreg::lane_count / 30;
  Bytes bits(current.samples * planes * shape.plane_rows * shape.row_bytes);
  make_mask(current, shape, threshold, bits.data());

  const int64_t spatial = shape.plane_rows * shape.sizes[2], per_sample = current.channels * spatial;
  const Numbers<double> shared_scale{1.25}, scales{1.25, 0.75, 1.5, 1.0};
  std::mt19937_64 random(static_cast<uint64_t>(per_sample));
  Matrix<Element> input(1, current.samples * per_sample), output(1, current.samples * per_sample);
  input.fill(random, 1.0, 1.0);
  const double* scale = current.shared ? shared_scale.data : scales.data;
  require(launch_drop_block_apply<Element>({.input = input.data,
                                            .output = output.data,
                                            .bits = bits.data(),
                                            .scale = scale,
                                            .elements = current.samples * per_sample,
                                            .row_bytes = shape.row_bytes,
                                            .sample_elements = divisor_of(per_sample),
                                            .channels = divisor_of(current.channels),
                                            .rows = divisor_of(shape.plane_rows),
                                            .width = divisor_of(shape.sizes[2]),
                                            .channels_last = current.channels_last,
                                            .shared = current.shared,
                                            .per_sample = !current.shared},
                                           nullptr));
  for (int64_t sample = 0; sample < current.samples; ++sample) {
    for (int64_t channel = 0; channel < current.channels; ++channel) {
      const int64_t plane = sample * planes + (current.shared ? 0 : channel);
      for (int64_t place = 0; place < spatial; ++place) {
        const int64_t position = sample * per_sample + (current.channels_last ? place * current.channels + channel
                                                                              : channel * spatial + place);
        const int64_t row = place / shape.sizes[2], of_row = place % shape.sizes[2];
        const int kept = bits.data()[(plane * shape.plane_rows + row) * shape.row_bytes + of_row / 8] >> of_row % 8 & 1;
        const double exact = kept * input.value(0, position) * scale[current.shared ? 0 : sample];
        require_close<Element>("output", output.value(0, position), exact, std::abs(exact));
      }
    }
  }
}

// Rows within a word and beyond, blocks wider than a window, clipped ones; seeds that fill their last word and do not;
// several blocks and warps a sample. Packs over several rows, pixels and channels, samples of whole packs and not.
constexpr BlockCase block_cases[] = {
    {90, 2, 3, 5, {1, 7, 7}, {1, 3, 3}, false, false, false},
    {90, 2, 2, 16, {1, 28, 30}, {1, 7, 5}, false, true, true},
    {90, 2, 1, 2, {1, 5, 100}, {1, 2, 40}, false, false, true},
    {90, 2, 2, 8, {4, 6, 34}, {2, 3, 4}, true, false, true},
    {90, 2, 1, 4, {1, 40, 64}, {1, 2, 64}, true, true, false},
    {90, 2, 4, 3, {1, 1, 1}, {1, 1, 1}, false, true, false},
    {90, 2, 1, 3, {8, 8, 32}, {1, 1, 1}, false, false, false},
};

}  // namespace

int main(int count, char** values) {
  int failed = 0;
#if !defined(FASTREG_STANDALONE_DROP_BLOCK)
  failed = run_cases(cases, count, values, [](const Case& current, const DeviceTraits& device) {
    run_case<bfloat16, float>(current, device);
#if !defined(FASTREG_STANDALONE_FEW)
    run_case<bfloat16, bfloat16>(current, device);
    run_case<float, float>(current, device);
    run_case<float16, float16>(current, device);
    run_case<float16, float>(current, device);
    run_case<float, bfloat16>(current, device);
    run_case<float, float16>(current, device);
#endif
  });
#endif
#if !defined(FASTREG_STANDALONE_DROPOUT)
  if (failed == 0) {
    failed = run_cases(block_cases, count, values, [](const BlockCase& current, const DeviceTraits&) {
      run_block_case<bfloat16>(current);
#if !defined(FASTREG_STANDALONE_FEW)
      run_block_case<float>(current);
      run_block_case<float16>(current);
#endif
    });
  }
#endif
  return failed;
}
