// What every program of kernels begins with and no mutant changes: read once, and precompiled (build.py). No guard:
// a compiler warns of one in the file that it begins with.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_simulator.h"
#include "tracer.h"
