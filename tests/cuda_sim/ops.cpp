// The simulator's operators, fastreg_cuda_sim::<name>, with the schemas of csrc/ops.cpp, and the functions that its Python
// side calls. The implementations are the doors of csrc/cuda, compiled into the same library.

#include <torch/csrc/stable/library.h>

#include <string>

#include "simulator.h"

#define fastreg_native fastreg_cuda_sim
#include "../../csrc/ops.cpp"

extern "C" {

void cuda_sim_configure(int architecture, int multiprocessors, int order, uint64_t seed, int clusters_at_once) {
  simulator::Device device{};
  device.architecture = architecture;
  device.multiprocessors = multiprocessors;
  const int kilobytes = architecture >= 120 ? 100 : architecture >= 90 ? 228 : 164;
  device.shared_bytes_per_multiprocessor = kilobytes * 1024;
  device.shared_bytes_per_block = (kilobytes - 1) * 1024;
  device.largest_cluster = architecture >= 90 ? 8 : 1;
  simulator::configure(device, {static_cast<simulator::Order>(order), seed, clusters_at_once});
}

// The kernels launched since the last call, as "count name" lines; valid until the next call.
const char* cuda_sim_launched() {
  static std::string text;
  text = simulator::launched();
  return text.c_str();
}
}
