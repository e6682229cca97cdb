// The arithmetic of Adam's family, one for every backend.
#pragma once
#include <cmath>

#include "include/multi_tensor.h"
#include "include/philox.h"

namespace megalm {

// What all elements of a step share; from double, since 1 - beta^step cancels.
struct AdamStep {
  float keep_first, keep_second, root, inverse, eps, weight_decay, decay, rate;
};

MEGALM_ANYWHERE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

MEGALM_ANYWHERE AdamStep adam_step(const MegalmMulti& a, int64_t step) {
  const double c1 = 1.0 - power(a.beta1, step), c2 = 1.0 - power(a.beta2, step);
  AdamStep s;
  s.keep_first = static_cast<float>(1.0 - a.beta1);
  s.keep_second = static_cast<float>(1.0 - a.beta2);
  s.root = static_cast<float>(1.0 / sqrt(c2));
  s.inverse = static_cast<float>(1.0 / c1);
  s.eps = static_cast<float>(a.eps);
  s.weight_decay = static_cast<float>(a.weight_decay);
  s.decay = static_cast<float>(1.0 - a.lr * a.weight_decay);
  s.rate = static_cast<float>(a.lr / c1);
  return s;
}

// Within 2 ulp: CUDA's exact division calls a function, for which a kernel spills registers.
MEGALM_ANYWHERE float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// The new moments, and the direction before its bias correction.
MEGALM_ANYWHERE float adam_moments(const AdamStep& s, float g, float& first, float& second) {
  first += (g - first) * s.keep_first;
  second += (g * g - second) * s.keep_second;
  return divide(first, sqrtf(second) * s.root + s.eps);
}

// What LAMB multiplies an update by: the learning rate in the ratio of the norms, alone where one of them is zero.
MEGALM_ANYWHERE float lamb_rate(double lr, double of_weight, double of_update) {
  return static_cast<float>(of_weight > 0.0 && of_update > 0.0 ? lr * sqrt(of_weight / of_update) : lr);
}

}  // namespace megalm
