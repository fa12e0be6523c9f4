// How far each thread is known to have come: the vector clocks of the tracer.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace simulator::tracer {

// Of each block that is known of, how far each of its threads is known to have come. Copies share what is equal.
class Clock {
 public:
  using Times = std::vector<uint32_t>;

  bool knows(uint32_t block, uint32_t index, uint32_t time) const {
    for (const auto& [known, times] : blocks_) {
      if (known == block) return index < times->size() && (*times)[index] >= time;
    }
    return false;
  }

  void set(uint32_t block, uint32_t index, uint32_t time) {
    Times& times = own(block, index + 1);
    times[index] = std::max(times[index], time);
  }

  void join(const Clock& other) {
    for (const auto& [block, times] : other.blocks_) {
      auto mine = std::find_if(blocks_.begin(), blocks_.end(), [&](const auto& entry) { return entry.first == block; });
      if (mine == blocks_.end()) {
        blocks_.emplace_back(block, times);
      } else if (mine->second != times) {
        join_times(mine->second, times);
      }
    }
  }

 private:
  std::vector<std::pair<uint32_t, std::shared_ptr<Times> > > blocks_;

  Times& own(uint32_t block, size_t size) {
    auto mine = std::find_if(blocks_.begin(), blocks_.end(), [&](const auto& entry) { return entry.first == block; });
    if (mine == blocks_.end()) {
      blocks_.emplace_back(block, std::make_shared<Times>());
      mine = blocks_.end() - 1;
    } else if (mine->second.use_count() > 1) {
      mine->second = std::make_shared<Times>(*mine->second);
    }
    if (mine->second->size() < size) mine->second->resize((size + 63) / 64 * 64);
    return *mine->second;
  }

  static void join_times(std::shared_ptr<Times>& mine, const std::shared_ptr<Times>& other) {
    const auto not_less = [](const Times& left, const Times& right) {
      if (left.size() < right.size()) return false;
      for (size_t index = 0; index < right.size(); ++index) {
        if (left[index] < right[index]) return false;
      }
      return true;
    };
    if (not_less(*mine, *other)) return;
    if (not_less(*other, *mine)) {
      mine = other;
      return;
    }
    auto joined = std::make_shared<Times>(*mine);
    joined->resize(std::max(mine->size(), other->size()));
    for (size_t index = 0; index < other->size(); ++index)
      (*joined)[index] = std::max((*joined)[index], (*other)[index]);
    mine = std::move(joined);
  }
};

}  // namespace simulator::tracer
