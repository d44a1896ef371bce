// Tables of cosines and sines for rotary positions, grown as far as positions have been seen.
#pragma once

#include <vector>

namespace hasten {

class RopeTable {
 public:
  RopeTable() = default;
  // inv_freq [half]; `scale` multiplies cosines and sines.
  RopeTable(std::vector<float> inv_freq, float scale) : inv_freq_(std::move(inv_freq)), scale_(scale) {}

  void grow(int positions);  // afterwards positions below this are there
  const float* cosines(int position) const { return &cosines_[position * inv_freq_.size()]; }
  const float* sines(int position) const { return &sines_[position * inv_freq_.size()]; }
  int rotary_dim() const { return 2 * (int)inv_freq_.size(); }

 private:
  std::vector<float> inv_freq_, cosines_, sines_;
  float scale_ = 1.0f;
  int positions_ = 0;
};

}  // namespace hasten
