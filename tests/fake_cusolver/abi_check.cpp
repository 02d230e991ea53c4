// Compiled with NVIDIA's headers: every declaration and value of csrc/abi.h equals theirs.
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include <type_traits>

#define RESM_CUDA_HEADERS
#include "abi.h"

#if CUSOLVER_VERSION < 12200
#define NOT_YET(name, result, arguments) result name arguments;
RESM_XPOLAR(NOT_YET)
#endif

#define SAME_TYPE(name, result, arguments) \
  static_assert(std::is_same_v<decltype(::name), result arguments>, #name);
RESM_CUSOLVER(SAME_TYPE)
RESM_CUDART(SAME_TYPE)

#define SAME_VALUE(name, value) static_assert(static_cast<int>(::name) == value, #name);
RESM_STATUS(SAME_VALUE)
RESM_EIG_MODE(SAME_VALUE)
RESM_EIG_RANGE(SAME_VALUE)
RESM_DETERMINISM(SAME_VALUE)
RESM_FILL_MODE(SAME_VALUE)
RESM_DATA_TYPE(SAME_VALUE)
RESM_PROPERTY(SAME_VALUE)
RESM_COPY_KIND(SAME_VALUE)
RESM_CUDA_ERROR(SAME_VALUE)

static_assert(sizeof(cusolverStatus_t) == sizeof(int) && sizeof(cudaDataType) == sizeof(int));
