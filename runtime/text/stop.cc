#include <algorithm>
#include <deque>

#include "runtime/text/stream.h"

namespace dsv3 {

StopMatcher::StopMatcher(std::vector<std::string> stops) : nodes_(1) {
  for (std::string& stop : stops) {
    if (stop.empty()) continue;
    const auto index = static_cast<int32_t>(stops_.size());
    int32_t node = 0;
    for (const char c : stop) {
      const auto byte = static_cast<uint8_t>(c);
      int32_t next = edge(node, byte);
      if (next < 0) {
        next = static_cast<int32_t>(nodes_.size());
        edges_.emplace(int64_t{node} * 256 + byte, next);
        nodes_.push_back({0, -1, nodes_[static_cast<size_t>(node)].depth + 1});
      }
      node = next;
    }
    nodes_[static_cast<size_t>(node)].match = index;
    stops_.push_back(std::move(stop));
  }
  size_t longest = 0;
  for (const std::string& stop : stops_) longest = std::max(longest, stop.size());
  if (longest > 0) held_.reserve(longest + kTokenTextBytes);
  // Breadth first: a node's failure link points to a shallower node, which is complete by then.
  std::vector<std::vector<std::pair<uint8_t, int32_t>>> children(nodes_.size());
  for (const auto& [key, child] : edges_) {
    children[static_cast<size_t>(key / 256)].emplace_back(static_cast<uint8_t>(key % 256), child);
  }
  std::deque<int32_t> queue = {0};
  while (!queue.empty()) {
    const int32_t node = queue.front();
    queue.pop_front();
    for (const auto& [byte, child] : children[static_cast<size_t>(node)]) {
      Node& c = nodes_[static_cast<size_t>(child)];
      c.fail = node == 0 ? 0 : step(nodes_[static_cast<size_t>(node)].fail, byte);
      if (c.match < 0) c.match = nodes_[static_cast<size_t>(c.fail)].match;
      queue.push_back(child);
    }
  }
}

int32_t StopMatcher::edge(int32_t node, uint8_t byte) const {
  const auto it = edges_.find(int64_t{node} * 256 + byte);
  return it == edges_.end() ? -1 : it->second;
}

int32_t StopMatcher::step(int32_t state, uint8_t byte) const {
  while (true) {
    const int32_t next = edge(state, byte);
    if (next >= 0) return next;
    if (state == 0) return 0;
    state = nodes_[static_cast<size_t>(state)].fail;
  }
}

bool StopMatcher::push(std::string_view text, std::string* out, size_t* consumed) {
  size_t looked_at = done_ ? 0 : text.size();
  if (!done_ && stops_.empty()) {
    out->append(text);
  } else if (!done_) {
    held_.append(text);
    for (size_t i = 0; i < text.size(); ++i) {
      state_ = step(state_, static_cast<uint8_t>(text[i]));
      const int32_t match = nodes_[static_cast<size_t>(state_)].match;
      if (match < 0) continue;
      matched_ = stops_[static_cast<size_t>(match)];
      done_ = true;
      looked_at = i + 1;
      held_.resize(held_.size() - (text.size() - looked_at) - matched_.size());
      out->append(held_);
      held_.clear();
      break;
    }
    if (!done_) {
      const size_t certain =
          held_.size() - static_cast<size_t>(nodes_[static_cast<size_t>(state_)].depth);
      out->append(held_, 0, certain);
      held_.erase(0, certain);
    }
  }
  if (consumed != nullptr) *consumed = looked_at;
  return done_;
}

void StopMatcher::finish(std::string* out) {
  out->append(held_);
  held_.clear();
  state_ = 0;
}

}  // namespace dsv3
