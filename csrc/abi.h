// The part of cuSOLVER's and the CUDA runtime's C interface that this extension calls.
//
// Declared here so that a C++ compiler alone builds it. Source: cusolverDn.h, cusolver_common.h,
// cublas_api.h, library_types.h and driver_types.h of cuSOLVER 12.4.1 and CUDA 13, the same since
// CUDA 12.0; tests/fake_cusolver/abi_check.cpp compares every type and value with the real headers.
#pragma once

#include <cstddef>
#include <cstdint>

#define RESM_STATUS(X)                                                                            \
  X(CUSOLVER_STATUS_SUCCESS, 0)                                                                   \
  X(CUSOLVER_STATUS_NOT_INITIALIZED, 1)                                                           \
  X(CUSOLVER_STATUS_ALLOC_FAILED, 2)                                                              \
  X(CUSOLVER_STATUS_INVALID_VALUE, 3)                                                             \
  X(CUSOLVER_STATUS_ARCH_MISMATCH, 4)                                                             \
  X(CUSOLVER_STATUS_MAPPING_ERROR, 5)                                                             \
  X(CUSOLVER_STATUS_EXECUTION_FAILED, 6)                                                          \
  X(CUSOLVER_STATUS_INTERNAL_ERROR, 7)                                                            \
  X(CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED, 8)                                                 \
  X(CUSOLVER_STATUS_NOT_SUPPORTED, 9)                                                             \
  X(CUSOLVER_STATUS_INVALID_WORKSPACE, 31)
#define RESM_EIG_MODE(X) X(CUSOLVER_EIG_MODE_VECTOR, 1)
#define RESM_EIG_RANGE(X) X(CUSOLVER_EIG_RANGE_I, 1002)
#define RESM_DETERMINISM(X) X(CUSOLVER_DETERMINISTIC_RESULTS, 1)
#define RESM_FILL_MODE(X)                                                                         \
  X(CUBLAS_FILL_MODE_LOWER, 0) X(CUBLAS_FILL_MODE_UPPER, 1) X(CUBLAS_FILL_MODE_FULL, 2)
#define RESM_DATA_TYPE(X) X(CUDA_R_32F, 0) X(CUDA_R_64F, 1)
#define RESM_PROPERTY(X) X(MAJOR_VERSION, 0) X(MINOR_VERSION, 1) X(PATCH_LEVEL, 2)
#define RESM_COPY_KIND(X) X(cudaMemcpyDeviceToHost, 2)
#define RESM_CUDA_ERROR(X) X(cudaSuccess, 0) X(cudaErrorUnknown, 999)

#ifndef RESM_CUDA_HEADERS
#define RESM_ENUMERATOR(name, value) name = value,
typedef enum { RESM_STATUS(RESM_ENUMERATOR) } cusolverStatus_t;
typedef enum { RESM_EIG_MODE(RESM_ENUMERATOR) } cusolverEigMode_t;
typedef enum { RESM_EIG_RANGE(RESM_ENUMERATOR) } cusolverEigRange_t;
typedef enum { RESM_DETERMINISM(RESM_ENUMERATOR) } cusolverDeterministicMode_t;
typedef enum { RESM_FILL_MODE(RESM_ENUMERATOR) } cublasFillMode_t;
typedef enum { RESM_DATA_TYPE(RESM_ENUMERATOR) } cudaDataType;
typedef enum { RESM_PROPERTY(RESM_ENUMERATOR) } libraryPropertyType;
typedef enum cudaMemcpyKind { RESM_COPY_KIND(RESM_ENUMERATOR) } cudaMemcpyKind;
typedef enum cudaError { RESM_CUDA_ERROR(RESM_ENUMERATOR) } cudaError_t;
#undef RESM_ENUMERATOR
typedef struct cusolverDnContext* cusolverDnHandle_t;
typedef struct cusolverDnParams* cusolverDnParams_t;
typedef struct gesvdjInfo* gesvdjInfo_t;
typedef struct CUstream_st* cudaStream_t;
#endif

// clang-format off
#define RESM_TYPED(X, letter, T)                                                                  \
  X(cusolverDn##letter##gesvdjBatched_bufferSize, cusolverStatus_t,                               \
    (cusolverDnHandle_t, cusolverEigMode_t, int m, int n, const T* A, int lda, const T* S,        \
     const T* U, int ldu, const T* V, int ldv, int* lwork, gesvdjInfo_t, int batch))              \
  X(cusolverDn##letter##gesvdjBatched, cusolverStatus_t,                                          \
    (cusolverDnHandle_t, cusolverEigMode_t, int m, int n, T* A, int lda, T* S, T* U, int ldu,     \
     T* V, int ldv, T* work, int lwork, int* info, gesvdjInfo_t, int batch))                      \
  X(cusolverDn##letter##gesvdaStridedBatched_bufferSize, cusolverStatus_t,                        \
    (cusolverDnHandle_t, cusolverEigMode_t, int rank, int m, int n, const T* A, int lda,          \
     long long stepA, const T* S, long long stepS, const T* U, int ldu, long long stepU,          \
     const T* V, int ldv, long long stepV, int* lwork, int batch))                                \
  X(cusolverDn##letter##gesvdaStridedBatched, cusolverStatus_t,                                   \
    (cusolverDnHandle_t, cusolverEigMode_t, int rank, int m, int n, const T* A, int lda,          \
     long long stepA, T* S, long long stepS, T* U, int ldu, long long stepU, T* V, int ldv,       \
     long long stepV, T* work, int lwork, int* info, double* residuals, int batch))

// Since cuSOLVER 12.2.
#define RESM_XPOLAR(X)                                                                            \
  X(cusolverDnXpolar_bufferSize, cusolverStatus_t,                                                \
    (cusolverDnHandle_t, cusolverDnParams_t, cublasFillMode_t, int64_t m, int64_t n,              \
     cudaDataType, const void* A, int64_t lda, cudaDataType, const void* H, int64_t ldh,          \
     cudaDataType, size_t* device_bytes, size_t* host_bytes))                                     \
  X(cusolverDnXpolar, cusolverStatus_t,                                                           \
    (cusolverDnHandle_t, cusolverDnParams_t, cublasFillMode_t, int64_t m, int64_t n,              \
     cudaDataType, void* A, int64_t lda, cudaDataType, void* H, int64_t ldh, cudaDataType,        \
     void* device_work, size_t device_bytes, void* host_work, size_t host_bytes,                  \
     double* residual, double* norm, double* rcond, int* info))

#define RESM_CUSOLVER(X)                                                                          \
  X(cusolverGetProperty, cusolverStatus_t, (libraryPropertyType, int*))                           \
  X(cusolverDnCreate, cusolverStatus_t, (cusolverDnHandle_t*))                                    \
  X(cusolverDnDestroy, cusolverStatus_t, (cusolverDnHandle_t))                                    \
  X(cusolverDnSetStream, cusolverStatus_t, (cusolverDnHandle_t, cudaStream_t))                    \
  X(cusolverDnSetDeterministicMode, cusolverStatus_t,                                             \
    (cusolverDnHandle_t, cusolverDeterministicMode_t))                                            \
  X(cusolverDnCreateParams, cusolverStatus_t, (cusolverDnParams_t*))                              \
  X(cusolverDnDestroyParams, cusolverStatus_t, (cusolverDnParams_t))                              \
  X(cusolverDnCreateGesvdjInfo, cusolverStatus_t, (gesvdjInfo_t*))                                \
  X(cusolverDnDestroyGesvdjInfo, cusolverStatus_t, (gesvdjInfo_t))                                \
  RESM_TYPED(X, S, float)                                                                         \
  RESM_TYPED(X, D, double)                                                                        \
  X(cusolverDnXsyevBatched_bufferSize, cusolverStatus_t,                                          \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t n,      \
     cudaDataType, const void* A, int64_t lda, cudaDataType, const void* W, cudaDataType,         \
     size_t* device_bytes, size_t* host_bytes, int64_t batch))                                    \
  X(cusolverDnXsyevBatched, cusolverStatus_t,                                                     \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t n,      \
     cudaDataType, void* A, int64_t lda, cudaDataType, void* W, cudaDataType, void* device_work,  \
     size_t device_bytes, void* host_work, size_t host_bytes, int* info, int64_t batch))          \
  X(cusolverDnXsyevd_bufferSize, cusolverStatus_t,                                                \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t n,      \
     cudaDataType, const void* A, int64_t lda, cudaDataType, const void* W, cudaDataType,         \
     size_t* device_bytes, size_t* host_bytes))                                                   \
  X(cusolverDnXsyevd, cusolverStatus_t,                                                           \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, int64_t n,      \
     cudaDataType, void* A, int64_t lda, cudaDataType, void* W, cudaDataType, void* device_work,  \
     size_t device_bytes, void* host_work, size_t host_bytes, int* info))                         \
  X(cusolverDnXsyevdx_bufferSize, cusolverStatus_t,                                               \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cusolverEigRange_t,               \
     cublasFillMode_t, int64_t n, cudaDataType, const void* A, int64_t lda, void* vl, void* vu,   \
     int64_t il, int64_t iu, int64_t* found, cudaDataType, const void* W, cudaDataType,           \
     size_t* device_bytes, size_t* host_bytes))                                                   \
  X(cusolverDnXsyevdx, cusolverStatus_t,                                                          \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cusolverEigRange_t,               \
     cublasFillMode_t, int64_t n, cudaDataType, void* A, int64_t lda, void* vl, void* vu,         \
     int64_t il, int64_t iu, int64_t* found, cudaDataType, void* W, cudaDataType,                 \
     void* device_work, size_t device_bytes, void* host_work, size_t host_bytes, int* info))      \
  X(cusolverDnXgesvdp_bufferSize, cusolverStatus_t,                                               \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, int econ, int64_t m, int64_t n,   \
     cudaDataType, const void* A, int64_t lda, cudaDataType, const void* S, cudaDataType,         \
     const void* U, int64_t ldu, cudaDataType, const void* V, int64_t ldv, cudaDataType,          \
     size_t* device_bytes, size_t* host_bytes))                                                   \
  X(cusolverDnXgesvdp, cusolverStatus_t,                                                          \
    (cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, int econ, int64_t m, int64_t n,   \
     cudaDataType, void* A, int64_t lda, cudaDataType, void* S, cudaDataType, void* U,            \
     int64_t ldu, cudaDataType, void* V, int64_t ldv, cudaDataType, void* device_work,            \
     size_t device_bytes, void* host_work, size_t host_bytes, int* info, double* perturbation))   \
  X(cusolverDnXgesvdr_bufferSize, cusolverStatus_t,                                               \
    (cusolverDnHandle_t, cusolverDnParams_t, signed char jobu, signed char jobv, int64_t m,       \
     int64_t n, int64_t k, int64_t p, int64_t iterations, cudaDataType, const void* A,            \
     int64_t lda, cudaDataType, const void* S, cudaDataType, const void* U, int64_t ldu,          \
     cudaDataType, const void* V, int64_t ldv, cudaDataType, size_t* device_bytes,                \
     size_t* host_bytes))                                                                         \
  X(cusolverDnXgesvdr, cusolverStatus_t,                                                          \
    (cusolverDnHandle_t, cusolverDnParams_t, signed char jobu, signed char jobv, int64_t m,       \
     int64_t n, int64_t k, int64_t p, int64_t iterations, cudaDataType, void* A, int64_t lda,     \
     cudaDataType, void* S, cudaDataType, void* U, int64_t ldu, cudaDataType, void* V,            \
     int64_t ldv, cudaDataType, void* device_work, size_t device_bytes, void* host_work,          \
     size_t host_bytes, int* info))                                                               \
  RESM_XPOLAR(X)

#define RESM_CUDART(X)                                                                            \
  X(cudaGetDevice, cudaError_t, (int*))                                                           \
  X(cudaMemcpyAsync, cudaError_t, (void*, const void*, size_t, cudaMemcpyKind, cudaStream_t))     \
  X(cudaStreamSynchronize, cudaError_t, (cudaStream_t))                                           \
  X(cudaGetErrorString, const char*, (cudaError_t))
// clang-format on
