// The polynomial behind every e^x of ours, for host and device code.
#pragma once

#include "device.h"

namespace vrthinker {

// (e^x - 1 - x) / x^2 where |x| <= ln 2 / 2. The coefficients are those of Cephes' expf.
VRTHINKER_HOST_DEVICE inline float exp_tail(float x) {
    float p = 1.9875691500e-4F;
    p = p * x + 1.3981999507e-3F;
    p = p * x + 8.3334519073e-3F;
    p = p * x + 4.1665795894e-2F;
    p = p * x + 1.6666665459e-1F;
    p = p * x + 5.0000001201e-1F;
    return p;
}

}  // namespace vrthinker
