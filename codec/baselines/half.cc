#include "codec/baselines/half.h"
