// SPDX-License-Identifier: Apache-2.0
// Steps for a part of a batch: the same plan, weights and strides, of fewer images.
#include "steps.h"

namespace hetconv {

std::shared_ptr<const Step> ConvStep::of_part(int64_t parts) const {
  auto step = std::make_shared<ConvStep>(*this);
  Problem& p = step->p_;
  const bool row = p.N == 1 && p.H == 1 && p.Ho == 1 && p.KH == 1 && p.KW == 1 && p.W == p.Wo &&
                   p.sw == 1 && p.pl == 0 && p.pt == 0;  // of all pixels of the batch
  if (parts > 1 && row && p.W % parts == 0)
    p.W = p.Wo = int(p.W / parts);
  else if (parts > 0 && p.N % parts == 0)
    p.N /= parts;
  else
    return nullptr;
  if (p.pool) p.pool = &step->pool_;
  return step;
}

std::shared_ptr<const Step> PoolStep::of_part(int64_t parts) const {
  if (parts < 1 || N_ % parts != 0) return nullptr;
  auto step = std::make_shared<PoolStep>(*this);
  step->N_ /= parts;
  return step;
}

}  // namespace hetconv
