// The pool of large blocks behind new_output and Scratch, and the op that empties it.

#include "allocator.h"

#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

namespace fastreg {
namespace {

// Outputs below large_output come from torch where its memory is resident; below this size they always do.
constexpr int64_t minimum_pooled = int64_t{1} << 20;

// Working memory from this size on is recycled too; below, the C library does it well.
constexpr int64_t large_scratch = int64_t{64} << 10;

// What may lie unused at most: less on a small machine.
constexpr int64_t maximum_retained = int64_t{1} << 30;
constexpr int64_t retained_fraction = 16;
constexpr size_t maximum_blocks = 64;

// From this size on blocks ask for pages of 2 MiB, which are found and zeroed several times faster than as many small
// ones, and need fewer entries in the processor's table of pages.
constexpr int64_t least_huge = int64_t{4} << 20;

// Eight sizes from one power of two to the next: a block is at most an eighth larger than asked for, and
// outputs whose lengths differ a little (a last batch, a longer sentence) share blocks.
int64_t block_bytes(int64_t bytes) {
  int64_t step = large_scratch / 8;
  while (step * 16 <= bytes) {
    step *= 2;
  }
  return (bytes + step - 1) / step * step;
}

class BlockPool {
 public:
  // Leaked on purpose: tensors may outlive every static object.
  static BlockPool& get() {
    static BlockPool* const pool = new BlockPool;
    return *pool;
  }

  void* allocate(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(),
                                      [&](const Block& block) { return block.bytes == bytes; });
      if (found != blocks_.rend()) {
        void* const data = found->data;
        retained_ -= bytes;
        blocks_.erase(std::next(found).base());
        return data;
      }
    }
    void* data = map(bytes);
    if (data == nullptr) {
      clear();  // what lies here unused may be what is missing
      data = map(bytes);
    }
    if (data == nullptr) {
      throw std::bad_alloc();
    }
    return data;
  }

  void release(void* data, int64_t bytes) {
    if (bytes > limit_) {
      return unmap({{data, bytes}});
    }
    std::vector<Block> evicted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back({data, bytes});
      retained_ += bytes;
      auto kept = blocks_.begin();
      for (; retained_ > limit_ || static_cast<size_t>(blocks_.end() - kept) > maximum_blocks; ++kept) {
        retained_ -= kept->bytes;
      }
      evicted.assign(blocks_.begin(), kept);
      blocks_.erase(blocks_.begin(), kept);
    }
    unmap(evicted);
  }

  void clear() {
    std::vector<Block> evicted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      evicted.swap(blocks_);
      retained_ = 0;
    }
    unmap(evicted);
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  BlockPool() {
    const int64_t memory = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
    limit_ = std::min(maximum_retained, memory / retained_fraction);
    // A child of fork must not inherit the lock held by a thread that it does not have.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
  }

  static void* map(int64_t bytes) {
    void* const data =
        mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      return nullptr;
    }
#ifdef MADV_HUGEPAGE
    // A wish: where the system has none, small pages do too, and a first use costs what it costs.
    if (bytes >= least_huge) {
      madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
    }
#endif
    return data;
  }

  static void unmap(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) {
      munmap(block.data, static_cast<size_t>(block.bytes));
    }
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // least recently used first
  int64_t retained_ = 0;
  int64_t limit_ = 0;
};

void release_block(void* data, void* bytes) {
  BlockPool::get().release(data, reinterpret_cast<intptr_t>(bytes));
}

void empty_cache() { BlockPool::get().clear(); }

// Whether the memory of a fresh tensor was in use before, going by its first, middle and last page.
bool is_resident(const void* data, int64_t bytes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  for (const int64_t offset : {int64_t{0}, bytes / 2, bytes - 1}) {
    unsigned char state = 0;
    const uintptr_t address = (begin + static_cast<uintptr_t>(offset)) / page * page;
    if (mincore(reinterpret_cast<void*>(address), 1, &state) != 0 || (state & 1) == 0) {
      return false;
    }
  }
  return true;
}

// A tensor of `bytes` bytes that is about to be made.
struct Layout {
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dimensions;
  int32_t dtype;
  Device device;
  int64_t bytes;
};

Tensor new_from_torch(const Layout& layout, const char* op) {
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_empty_strided(layout.dimensions, layout.sizes, layout.strides, layout.dtype,
                                      layout.device.type, layout.device.index, &handle),
             op, "allocate an output");
  return Tensor(handle);
}

Tensor new_pooled(const Layout& layout, const char* op) {
  const int64_t bytes = block_bytes(layout.bytes);
  void* const data = BlockPool::get().allocate(bytes);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status = torch_from_blob(
      data, layout.dimensions, layout.sizes, layout.strides, 0, layout.dtype, layout.device.type,
      layout.device.index, &handle, aoti_torch_layout_strided(), nullptr, 0, release_block,
      reinterpret_cast<void*>(bytes));
  if (status != 0) {
    BlockPool::get().release(data, bytes);
  }
  check_call(status, op, "make an output");
  return Tensor(handle);
}

Tensor new_from_either(const Layout& layout, const char* op) {
  if (layout.bytes < large_output) {
    Tensor output = new_from_torch(layout, op);
    if (layout.bytes < minimum_pooled || is_resident(data_of(output, op), layout.bytes)) {
      return output;
    }
  }
  return new_pooled(layout, op);
}

}  // namespace

Tensor new_output(const int64_t* sizes, const int64_t* strides, int64_t dimensions, DType dtype, Device device,
                  const char* op) {
  int64_t bytes = element_size(dtype);
  for (int64_t dimension = 0; dimension < dimensions; ++dimension) {
    bytes *= sizes[dimension];
  }
  return new_from_either({sizes, strides, dimensions, torch_dtype(dtype), device, bytes}, op);
}

Tensor new_bytes(const int64_t* sizes, int64_t dimensions, Device device, const char* op) {
  int64_t strides[maximum_dimensions];
  contiguous_strides(sizes, dimensions, strides);
  const int64_t bytes = std::accumulate(sizes, sizes + dimensions, int64_t{1}, std::multiplies<>());
  return new_from_either({sizes, strides, dimensions, aoti_torch_dtype_uint8(), device, bytes}, op);
}

Scratch::~Scratch() {
  if (pooled_bytes_ > 0) {
    BlockPool::get().release(data_, pooled_bytes_);
  } else {
    std::free(data_);
  }
}

void* Scratch::reserve(int64_t bytes) {
  if (bytes >= large_scratch) {
    const int64_t block = block_bytes(bytes);
    data_ = BlockPool::get().allocate(block);
    pooled_bytes_ = block;
    return data_;
  }
  constexpr size_t line = 64;
  data_ = std::aligned_alloc(line, (static_cast<size_t>(bytes) + line) / line * line);
  if (data_ == nullptr) {
    throw std::bad_alloc();
  }
  return data_;
}

}  // namespace fastreg

STABLE_TORCH_LIBRARY_IMPL(fastreg_native, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&fastreg::empty_cache));
}
