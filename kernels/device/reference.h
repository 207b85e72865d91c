// What a layer must give: every output in double precision, and how far float32 may be from it.
#ifndef TICKETKIT_DEVICE_REFERENCE_H_
#define TICKETKIT_DEVICE_REFERENCE_H_

#include <vector>

#include "job.h"

namespace tk::device {

struct Reference {
  std::vector<double> sums;   // bias and products, before residual and activation
  double tolerance = 0;       // of a sum in float32, whatever the order of its terms
  double half_tolerance = 0;  // of one in half precision: by its epsilon, and 2^-24 for whatever is too small for it
};

// A sum of n terms in float32 is off by at most (n + 1) eps times the sum of their magnitudes, each product, addition and the rounding of
// the bias counted (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); taken for the row where that is largest, twice.
Reference reference(const Job& job);

// Output number i in double precision, with residual, clip and activation as that engine has them.
double expected(const Reference& r, const Job& job, const Engine& engine, size_t i);

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_REFERENCE_H_
