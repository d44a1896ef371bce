// The angle is rounded to float, as Transformers and the trainings do: at position 10^5 that is 0.004 rad, and a model has
// learnt with it. Its cosine and sine are then taken in double.
#include "rope.h"

#include <cmath>

namespace hasten {

void RopeTable::grow(int positions) {
  if (positions <= positions_) return;
  // In small pieces: this happens within a step, and every position costs a few microseconds.
  const int end = (positions + 255) / 256 * 256;
  const size_t half = inv_freq_.size();
  cosines_.resize(end * half);
  sines_.resize(end * half);
  for (int p = positions_; p < end; p++)
    for (size_t i = 0; i < half; i++) {
      const double angle = (float)p * inv_freq_[i];
      cosines_[p * half + i] = (float)std::cos(angle) * scale_;
      sines_[p * half + i] = (float)std::sin(angle) * scale_;
    }
  positions_ = end;
}

}  // namespace hasten
