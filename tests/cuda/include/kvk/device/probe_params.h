#pragma once

namespace kvk::device {

struct ProbeParams {
  float* x;
  float add;
  int index;
};

}  // namespace kvk::device
