// cuSOLVER and the CUDA runtime on host memory: the same symbols, every argument checked, every
// call recorded. FAKE_VERSION = 11400 leaves out what cuSOLVER 11.4 did not have.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "abi.h"

#ifndef FAKE_VERSION
#define FAKE_VERSION 12400
#endif

struct cusolverDnContext {
  cudaStream_t stream = nullptr;
  bool deterministic = false;
  int device = 0;
};
struct cusolverDnParams {};
struct gesvdjInfo {};

namespace {

using Buffer = std::vector<double>;

struct State {
  std::mutex mutex;
  std::vector<std::string> calls;
  std::map<int, int> info;            // batch entry -> info to report
  std::map<std::string, int> status;  // function -> status to return
  std::map<std::string, long long> sizes;  // function -> workspace to ask for instead
  std::set<const void*> live;
  std::string text;
  bool closed = false;  // Xsyevd waits until the gate is open
  std::condition_variable opened;
};

State& state() {
  static State instance;
  return instance;
}

thread_local int current_device = 0;

template <class... Values>
void record(const char* name, const Values&... values) {
  std::lock_guard<std::mutex> lock(state().mutex);
  std::string line = name;
  ((line += " " + std::to_string(values)), ...);
  state().calls.push_back(line);
}

// Says in the record which argument is wrong, as -info does.
cusolverStatus_t refuse(const char* name, const char* why) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().calls.push_back(std::string("REFUSED ") + name + ": " + why);
  return CUSOLVER_STATUS_INVALID_VALUE;
}

bool alive(const void* object) {
  std::lock_guard<std::mutex> lock(state().mutex);
  return object && state().live.count(object);
}

template <class T>
T* born(T* object) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().live.insert(object);
  return object;
}

template <class T>
cusolverStatus_t dies(T* object) {
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    if (!state().live.erase(object)) return CUSOLVER_STATUS_NOT_INITIALIZED;
  }
  delete object;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t told(const char* name) {
  std::lock_guard<std::mutex> lock(state().mutex);
  const auto found = state().status.find(name);
  return found == state().status.end() ? CUSOLVER_STATUS_SUCCESS
                                       : static_cast<cusolverStatus_t>(found->second);
}

int told_info(int entry) {
  std::lock_guard<std::mutex> lock(state().mutex);
  const auto found = state().info.find(entry);
  return found == state().info.end() ? 0 : found->second;
}

long long told_size(const char* name, long long size) {
  std::lock_guard<std::mutex> lock(state().mutex);
  const auto found = state().sizes.find(name);
  return found == state().sizes.end() ? size : found->second;
}

double& entry(Buffer& a, long long rows, long long i, long long j) { return a[i + j * rows]; }

// Columns of q that are zero are replaced by unit vectors orthogonal to all others.
void complete(Buffer& q, long long rows, long long columns) {
  const auto norm = [&](long long j) {
    double sum = 0;
    for (long long i = 0; i < rows; ++i) sum += entry(q, rows, i, j) * entry(q, rows, i, j);
    return std::sqrt(sum);
  };
  for (long long j = 0; j < columns; ++j) {
    for (long long unit = 0; norm(j) < 0.5; ++unit) {
      for (long long i = 0; i < rows; ++i) entry(q, rows, i, j) = i == unit;
      for (int twice = 0; twice < 2; ++twice)
        for (long long other = 0; other < columns; ++other) {
          if (other == j) continue;
          double dot = 0;
          for (long long i = 0; i < rows; ++i)
            dot += entry(q, rows, i, j) * entry(q, rows, i, other);
          for (long long i = 0; i < rows; ++i)
            entry(q, rows, i, j) -= dot * entry(q, rows, i, other);
        }
      const double length = norm(j);
      for (long long i = 0; i < rows; ++i)
        entry(q, rows, i, j) = length > 1e-3 ? entry(q, rows, i, j) / length : 0.0;
    }
  }
}

struct Factors {
  Buffer u, s, v;  // m x k, k, n x k
};

// One-sided Jacobi: rotates the columns of A V until they are orthogonal.
Factors svd(Buffer a, long long m, long long n) {
  if (m < n) {
    Buffer t(m * n);
    for (long long i = 0; i < m; ++i)
      for (long long j = 0; j < n; ++j) entry(t, n, j, i) = entry(a, m, i, j);
    Factors f = svd(std::move(t), n, m);
    std::swap(f.u, f.v);
    return f;
  }
  Buffer v(n * n);
  for (long long i = 0; i < n; ++i) entry(v, n, i, i) = 1;
  for (int sweep = 0; sweep < 60; ++sweep) {
    bool rotated = false;
    for (long long p = 0; p < n; ++p)
      for (long long q = p + 1; q < n; ++q) {
        double alpha = 0, beta = 0, gamma = 0;
        for (long long i = 0; i < m; ++i) {
          alpha += entry(a, m, i, p) * entry(a, m, i, p);
          beta += entry(a, m, i, q) * entry(a, m, i, q);
          gamma += entry(a, m, i, p) * entry(a, m, i, q);
        }
        if (std::abs(gamma) <= 1e-16 * std::sqrt(alpha * beta)) continue;
        rotated = true;
        const double zeta = (beta - alpha) / (2 * gamma);
        const double t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
        const double c = 1 / std::sqrt(1 + t * t), s = c * t;
        const auto rotate = [&](Buffer& x, long long rows) {
          for (long long i = 0; i < rows; ++i) {
            const double left = entry(x, rows, i, p), right = entry(x, rows, i, q);
            entry(x, rows, i, p) = c * left - s * right;
            entry(x, rows, i, q) = s * left + c * right;
          }
        };
        rotate(a, m);
        rotate(v, n);
      }
    if (!rotated) break;
  }
  Buffer norms(n);
  for (long long j = 0; j < n; ++j)
    for (long long i = 0; i < m; ++i) norms[j] += entry(a, m, i, j) * entry(a, m, i, j);
  std::vector<long long> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto x, auto y) { return norms[x] > norms[y]; });
  const double floor = 1e-15 * std::sqrt(norms[order[0]]);
  Factors f{Buffer(m * n), Buffer(n), Buffer(n * n)};
  for (long long j = 0; j < n; ++j) {
    f.s[j] = std::sqrt(norms[order[j]]);
    for (long long i = 0; i < n; ++i) entry(f.v, n, i, j) = entry(v, n, i, order[j]);
    for (long long i = 0; i < m && f.s[j] > floor; ++i)
      entry(f.u, m, i, j) = entry(a, m, i, order[j]) / f.s[j];
  }
  complete(f.u, m, n);
  return f;
}

// Eigenvalues ascending, by two-sided Jacobi rotations: rows and columns of A until it is diagonal.
Factors eigen(Buffer a, long long n) {
  Buffer v(n * n);
  for (long long i = 0; i < n; ++i) entry(v, n, i, i) = 1;
  double largest = 0;
  for (const double x : a) largest = std::max(largest, std::abs(x));
  bool rotated = largest > 0;
  for (int sweep = 0; sweep < 60 && rotated; ++sweep) {
    rotated = false;
    for (long long p = 0; p < n; ++p)
      for (long long q = p + 1; q < n; ++q) {
        const double off = entry(a, n, p, q);
        if (std::abs(off) <= 1e-17 * largest) continue;
        rotated = true;
        const double zeta = (entry(a, n, q, q) - entry(a, n, p, p)) / (2 * off);
        const double t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
        const double c = 1 / std::sqrt(1 + t * t), s = c * t;
        const auto rotate = [&](double& left, double& right) {
          const double before = left;
          left = c * before - s * right;
          right = s * before + c * right;
        };
        for (long long i = 0; i < n; ++i) rotate(entry(a, n, i, p), entry(a, n, i, q));
        for (long long i = 0; i < n; ++i) rotate(entry(a, n, p, i), entry(a, n, q, i));
        for (long long i = 0; i < n; ++i) rotate(entry(v, n, i, p), entry(v, n, i, q));
      }
  }
  std::vector<long long> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](auto x, auto y) { return entry(a, n, x, x) < entry(a, n, y, y); });
  Factors result{Buffer(n * n), Buffer(n), {}};
  for (long long j = 0; j < n; ++j) {
    result.s[j] = entry(a, n, order[j], order[j]);
    for (long long i = 0; i < n; ++i) entry(result.u, n, i, j) = entry(v, n, i, order[j]);
  }
  return result;
}

template <class T>
Buffer load(const T* a, long long m, long long n, long long ld) {
  Buffer b(m * n);
  for (long long j = 0; j < n; ++j)
    for (long long i = 0; i < m; ++i) b[i + j * m] = a[i + j * ld];
  if (!std::all_of(b.begin(), b.end(), [](double x) { return std::isfinite(x); }))
    record("NONFINITE INPUT");
  return b;
}

// Only the named triangle is read, as cuSOLVER does.
template <class T>
Buffer load_symmetric(const T* a, cublasFillMode_t uplo, long long n, long long ld) {
  Buffer b(n * n);
  for (long long j = 0; j < n; ++j)
    for (long long i = j; i < n; ++i) {
      const double x = uplo == CUBLAS_FILL_MODE_LOWER ? a[i + j * ld] : a[j + i * ld];
      b[i + j * n] = b[j + i * n] = x;
      if (!std::isfinite(x)) record("NONFINITE INPUT");
    }
  return b;
}

template <class T>
void store(T* target, const Buffer& b, long long rows, long long columns, long long ld) {
  for (long long j = 0; j < columns; ++j)
    for (long long i = 0; i < rows; ++i) target[i + j * ld] = static_cast<T>(b[i + j * rows]);
}

// Writes all of a workspace: one that is too small is an error for AddressSanitizer.
bool scribble(void* work, std::size_t bytes) {
  if (!work || !bytes) return false;
  std::memset(work, 0xA5, bytes);
  return true;
}

template <class T>
cusolverStatus_t gesvdj(const char* name, cusolverDnHandle_t handle, cusolverEigMode_t jobz, int m,
                        int n, T* A, int lda, T* S, T* U, int ldu, T* V, int ldv, T* work,
                        int lwork, int* info, gesvdjInfo_t params, int batch) {
  if (!alive(handle) || !alive(params)) return refuse(name, "handle or params");
  record(name, m, n, lda, ldu, ldv, batch, reinterpret_cast<std::uintptr_t>(handle->stream));
  if (jobz != CUSOLVER_EIG_MODE_VECTOR || m > 32 || n > 32 || m < 1 || n < 1 || batch < 1)
    return refuse(name, "size");
  if (!A || !S || !U || !V || !info) return refuse(name, "null");
  if (lda < m || ldu < m || ldv < n) return refuse(name, "leading dimension");
  if (lwork < m * n * batch + 7 || !scribble(work, sizeof(T) * lwork)) return refuse(name, "workspace");
  if (const auto status = told(name)) return status;
  const int k = std::min(m, n);
  for (int b = 0; b < batch; ++b) {
    T* a = A + static_cast<long long>(lda) * n * b;
    Factors f = svd(load(a, m, n, lda), m, n);
    Buffer u(m * m), v(n * n);
    std::copy(f.u.begin(), f.u.end(), u.begin());
    std::copy(f.v.begin(), f.v.end(), v.begin());
    complete(u, m, m);
    complete(v, n, n);
    store(S + static_cast<long long>(k) * b, f.s, k, 1, k);
    store(U + static_cast<long long>(ldu) * m * b, u, m, m, ldu);
    store(V + static_cast<long long>(ldv) * n * b, v, n, n, ldv);
    store(a, Buffer(m * n, std::numeric_limits<double>::quiet_NaN()), m, n, lda);
    info[b] = told_info(b);
  }
  return CUSOLVER_STATUS_SUCCESS;
}

template <class T>
cusolverStatus_t gesvda(const char* name, cusolverDnHandle_t handle, cusolverEigMode_t jobz,
                        int rank, int m, int n, const T* A, int lda, long long stepA, T* S,
                        long long stepS, T* U, int ldu, long long stepU, T* V, int ldv,
                        long long stepV, T* work, int lwork, int* info, int batch) {
  record(name, rank, m, n, lda, stepA, batch);
  if (!alive(handle)) return refuse(name, "handle");
  if (jobz != CUSOLVER_EIG_MODE_VECTOR || m < n || rank < 1 || rank > n || batch < 1)
    return refuse(name, "size");
  if (!A || !S || !U || !V || !info) return refuse(name, "null");
  if (lda < m || ldu < m || ldv < n) return refuse(name, "leading dimension");
  if (batch > 1 && (stepA < static_cast<long long>(lda) * n || stepS < rank ||
                    stepU < static_cast<long long>(ldu) * rank ||
                    stepV < static_cast<long long>(ldv) * rank))
    return refuse(name, "step");
  if (std::max({stepA, stepS, stepU, stepV}) > std::numeric_limits<int>::max() / batch)
    return refuse(name, "int32");
  if (lwork < n * n * batch + 3 || !scribble(work, sizeof(T) * lwork))
    return refuse(name, "workspace");
  if (const auto status = told(name)) return status;
  for (int b = 0; b < batch; ++b) {
    Factors f = svd(load(A + stepA * b, m, n, lda), m, n);
    if (f.s[0] == 0) std::fill(f.u.begin(), f.u.end(), std::nan(""));  // what gesvda is known for
    store(S + stepS * b, f.s, rank, 1, rank);
    store(U + stepU * b, f.u, m, rank, ldu);
    store(V + stepV * b, f.v, n, rank, ldv);
    info[b] = told_info(b);
  }
  return CUSOLVER_STATUS_SUCCESS;
}

template <class T>
void syev(cublasFillMode_t uplo, long long n, void* A, long long lda, void* W, long long first,
          bool poison) {
  T* a = static_cast<T*>(A);
  Factors f = eigen(load_symmetric(a, uplo, n, lda), n);
  if (poison) store(a, Buffer(n * n, std::nan("")), n, n, lda);
  store(static_cast<T*>(W), Buffer(f.s.begin() + first, f.s.end()), n - first, 1, n);
  store(a, Buffer(f.u.begin() + first * n, f.u.end()), n, n - first, lda);
}

void syev(cudaDataType type, cublasFillMode_t uplo, long long n, void* A, long long lda, void* W,
          long long first, bool poison = false) {
  if (type == CUDA_R_64F)
    syev<double>(uplo, n, A, lda, W, first, poison);
  else
    syev<float>(uplo, n, A, lda, W, first, poison);
}

std::size_t device_size(long long n, cudaDataType type) { return 8 * n * n + 64 + type; }
// What XsyevBatched has refused: batches of 40,000 (mujocolab/mjlab #732); JAX counts bytes.
[[maybe_unused]] bool fits_int32(long long entries, long long batch, cudaDataType type) {
  const long long bytes = entries * batch * (type == CUDA_R_64F ? 8 : 4);
  return batch == 1 || (batch <= 16384 && bytes <= std::numeric_limits<int>::max());
}

std::size_t host_size(long long n) { return 16 * n + 5; }

cusolverStatus_t check(const char* name, cusolverDnHandle_t handle, cusolverDnParams_t params,
                       bool sizes, bool pointers, bool leading) {
  if (!alive(handle) || !alive(params)) return refuse(name, "handle or params");
  if (!sizes) return refuse(name, "size");
  if (!pointers) return refuse(name, "null");
  if (!leading) return refuse(name, "leading dimension");
  return told(name);
}

cusolverStatus_t check_work(const char* name, void* device, std::size_t on_device, void* host,
                            std::size_t on_host, std::size_t least_device, std::size_t least_host) {
  if (on_device < least_device || !scribble(device, on_device))
    return refuse(name, "device workspace");
  if (on_host < least_host || !scribble(host, on_host)) return refuse(name, "host workspace");
  return CUSOLVER_STATUS_SUCCESS;
}

template <class T>
void store_svd(long long m, long long n, void* A, long long lda, void* S, void* U, long long ldu,
               void* V, long long ldv, long long rank) {
  T* a = static_cast<T*>(A);
  Factors f = svd(load(a, m, n, lda), m, n);
  store(a, Buffer(m * n, std::nan("")), m, n, lda);
  store(static_cast<T*>(S), f.s, rank, 1, rank);
  store(static_cast<T*>(U), f.u, m, rank, ldu);
  store(static_cast<T*>(V), f.v, n, rank, ldv);
}

template <class T>
void store_polar(long long m, long long n, void* A, long long lda, void* H, long long ldh,
                 double* residual, double* norm, double* rcond) {
  T *a = static_cast<T*>(A), *h = static_cast<T*>(H);
  Factors f = svd(load(a, m, n, lda), m, n);
  double squares = 0;
  for (const double s : f.s) squares += s * s;
  for (long long j = 0; j < n; ++j) {
    for (long long i = 0; i < m; ++i) {
      double sum = 0;
      for (long long l = 0; l < n; ++l) sum += f.u[i + l * m] * f.v[j + l * n];
      a[i + j * lda] = static_cast<T>(sum);
    }
    for (long long i = 0; i < n; ++i) {
      double sum = 0;
      for (long long l = 0; l < n; ++l) sum += f.v[i + l * n] * f.s[l] * f.v[j + l * n];
      h[i + j * ldh] = static_cast<T>(sum);
    }
  }
  // cuSOLVER 12.2.0 adds to what it finds.
  *residual += 1e-7;
  *norm += std::sqrt(squares);
  *rcond += f.s[n - 1] / f.s[0];
}

}  // namespace

extern "C" {

void fake_reset() {
  auto& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.calls.clear();
  s.info.clear();
  s.status.clear();
  s.sizes.clear();
}
const char* fake_calls() {
  auto& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.text.clear();
  for (const auto& line : s.calls) s.text += line + "\n";
  return s.text.c_str();
}
void fake_info(int entry, int info) { state().info[entry] = info; }
void fake_status(const char* function, int status) { state().status[function] = status; }
void fake_size(const char* function, long long size) { state().sizes[function] = size; }
void fake_gate(int closed) {
  {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().closed = closed;
  }
  state().opened.notify_all();
}
void fake_device(int device) { current_device = device; }
int fake_live() { return static_cast<int>(state().live.size()); }

cusolverStatus_t cusolverGetProperty(libraryPropertyType property, int* value) {
  const int parts[] = {FAKE_VERSION / 1000, FAKE_VERSION / 100 % 10, FAKE_VERSION % 100};
  *value = parts[property];
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  record("cusolverDnCreate", current_device);
  if (const auto status = told("cusolverDnCreate")) return status;
  *handle = born(new cusolverDnContext);
  (*handle)->device = current_device;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) {
  if (alive(handle) && handle->device != current_device) refuse("cusolverDnDestroy", "device");
  return dies(handle);
}
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
  if (!alive(handle)) return CUSOLVER_STATUS_NOT_INITIALIZED;
  if (handle->device != current_device) return refuse("cusolverDnSetStream", "device");
  handle->stream = stream;
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  if (const auto status = told("cusolverDnCreateParams")) return status;
  *params = born(new cusolverDnParams);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params) { return dies(params); }
cusolverStatus_t cusolverDnCreateGesvdjInfo(gesvdjInfo_t* info) {
  *info = born(new gesvdjInfo);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnDestroyGesvdjInfo(gesvdjInfo_t info) { return dies(info); }

#define FAKE_TYPED(letter, T)                                                                     \
  cusolverStatus_t cusolverDn##letter##gesvdjBatched_bufferSize(                                  \
      cusolverDnHandle_t handle, cusolverEigMode_t, int m, int n, const T*, int, const T*,        \
      const T*, int, const T*, int, int* lwork, gesvdjInfo_t, int batch) {                        \
    const char* name = "cusolverDn" #letter "gesvdjBatched_bufferSize";                           \
    if (!alive(handle)) return refuse(name, "handle");                                            \
    *lwork = static_cast<int>(told_size(name, m * n * batch + 7));                                \
    return told(name);                                                                            \
  }                                                                                               \
  cusolverStatus_t cusolverDn##letter##gesvdjBatched(                                             \
      cusolverDnHandle_t handle, cusolverEigMode_t jobz, int m, int n, T* A, int lda, T* S, T* U, \
      int ldu, T* V, int ldv, T* work, int lwork, int* info, gesvdjInfo_t params, int batch) {    \
    return gesvdj<T>("cusolverDn" #letter "gesvdjBatched", handle, jobz, m, n, A, lda, S, U, ldu, \
                     V, ldv, work, lwork, info, params, batch);                                   \
  }                                                                                               \
  cusolverStatus_t cusolverDn##letter##gesvdaStridedBatched_bufferSize(                           \
      cusolverDnHandle_t handle, cusolverEigMode_t, int, int, int n, const T*, int, long long,    \
      const T*, long long, const T*, int, long long, const T*, int, long long, int* lwork,        \
      int batch) {                                                                                \
    const char* name = "cusolverDn" #letter "gesvdaStridedBatched_bufferSize";                    \
    if (!alive(handle)) return refuse(name, "handle");                                            \
    *lwork = static_cast<int>(told_size(name, n * n * batch + 3));                                \
    return told(name);                                                                            \
  }                                                                                               \
  cusolverStatus_t cusolverDn##letter##gesvdaStridedBatched(                                      \
      cusolverDnHandle_t handle, cusolverEigMode_t jobz, int rank, int m, int n, const T* A,      \
      int lda, long long stepA, T* S, long long stepS, T* U, int ldu, long long stepU, T* V,      \
      int ldv, long long stepV, T* work, int lwork, int* info, double*, int batch) {              \
    return gesvda<T>("cusolverDn" #letter "gesvdaStridedBatched", handle, jobz, rank, m, n, A,    \
                     lda, stepA, S, stepS, U, ldu, stepU, V, ldv, stepV, work, lwork, info,       \
                     batch);                                                                      \
  }
FAKE_TYPED(S, float)
FAKE_TYPED(D, double)

cusolverStatus_t cusolverDnXsyevd_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                             cusolverEigMode_t, cublasFillMode_t, int64_t n,
                                             cudaDataType type, const void* A, int64_t lda,
                                             cudaDataType, const void* W, cudaDataType,
                                             size_t* device_bytes, size_t* host_bytes) {
  *device_bytes = device_size(n, type);
  *host_bytes = host_size(n);
  return check("cusolverDnXsyevd_bufferSize", handle, params, n > 0, A && W, lda >= n);
}
cusolverStatus_t cusolverDnXsyevd(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                  cusolverEigMode_t, cublasFillMode_t uplo, int64_t n,
                                  cudaDataType type, void* A, int64_t lda, cudaDataType, void* W,
                                  cudaDataType, void* device, size_t on_device, void* host,
                                  size_t on_host, int* info) {
  const char* name = "cusolverDnXsyevd";
  record(name, n, lda, static_cast<int>(uplo));
  {
    std::unique_lock<std::mutex> lock(state().mutex);
    if (!state().opened.wait_for(lock, std::chrono::seconds(20), [] { return !state().closed; }))
      return CUSOLVER_STATUS_EXECUTION_FAILED;
  }
  if (const auto bad = check(name, handle, params, n > 0, A && W && info, lda >= n)) return bad;
  if (const auto bad = check_work(name, device, on_device, host, on_host, device_size(n, type),
                                  host_size(n)))
    return bad;
  syev(type, uplo, n, A, lda, W, 0);
  *info = told_info(0);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXsyevdx_bufferSize(
    cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t, cusolverEigRange_t,
    cublasFillMode_t, int64_t n, cudaDataType type, const void* A, int64_t lda, void* vl, void* vu,
    int64_t il, int64_t iu, int64_t* found, cudaDataType, const void* W, cudaDataType,
    size_t* device_bytes, size_t* host_bytes) {
  *device_bytes = device_size(n, type);
  *host_bytes = host_size(n);
  return check("cusolverDnXsyevdx_bufferSize", handle, params, 1 <= il && il <= iu && iu <= n,
               A && W && vl && vu && found, lda >= n);
}
cusolverStatus_t cusolverDnXsyevdx(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                   cusolverEigMode_t, cusolverEigRange_t range,
                                   cublasFillMode_t uplo, int64_t n, cudaDataType type, void* A,
                                   int64_t lda, void*, void*, int64_t il, int64_t iu,
                                   int64_t* found, cudaDataType, void* W, cudaDataType,
                                   void* device, size_t on_device, void* host, size_t on_host,
                                   int* info) {
  const char* name = "cusolverDnXsyevdx";
  record(name, n, lda, il, iu);
  if (const auto bad = check(name, handle, params,
                             range == CUSOLVER_EIG_RANGE_I && 1 <= il && il <= iu && iu == n,
                             A && W && found && info, lda >= n))
    return bad;
  if (const auto bad = check_work(name, device, on_device, host, on_host, device_size(n, type),
                                  host_size(n)))
    return bad;
  syev(type, uplo, n, A, lda, W, il - 1, true);
  *found = told_size(name, iu - il + 1);
  *info = told_info(0);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXgesvdp_bufferSize(
    cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t, int econ, int64_t m,
    int64_t n, cudaDataType type, const void* A, int64_t lda, cudaDataType, const void* S,
    cudaDataType, const void* U, int64_t ldu, cudaDataType, const void* V, int64_t ldv,
    cudaDataType, size_t* device_bytes, size_t* host_bytes) {
  *device_bytes = device_size(std::max(m, n), type);
  *host_bytes = host_size(n);
  return check("cusolverDnXgesvdp_bufferSize", handle, params, econ == 1 && m > 0 && n > 0,
               A && S && U && V, lda >= m && ldu >= m && ldv >= n);
}
cusolverStatus_t cusolverDnXgesvdp(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                   cusolverEigMode_t, int econ, int64_t m, int64_t n,
                                   cudaDataType type, void* A, int64_t lda, cudaDataType, void* S,
                                   cudaDataType, void* U, int64_t ldu, cudaDataType, void* V,
                                   int64_t ldv, cudaDataType, void* device, size_t on_device,
                                   void* host, size_t on_host, int* info, double* perturbation) {
  const char* name = "cusolverDnXgesvdp";
  record(name, m, n, lda);
  if (const auto bad = check(name, handle, params, econ == 1 && m > 0 && n > 0,
                             A && S && U && V && info && perturbation,
                             lda >= m && ldu >= m && ldv >= n))
    return bad;
  if (const auto bad = check_work(name, device, on_device, host, on_host,
                                  device_size(std::max(m, n), type), host_size(n)))
    return bad;
  const auto run = type == CUDA_R_64F ? store_svd<double> : store_svd<float>;
  run(m, n, A, lda, S, U, ldu, V, ldv, std::min(m, n));
  *perturbation = 1e-20 * told_size(name, 1);
  *info = told_info(0);
  return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXgesvdr_bufferSize(
    cusolverDnHandle_t handle, cusolverDnParams_t params, signed char jobu, signed char jobv,
    int64_t m, int64_t n, int64_t k, int64_t p, int64_t, cudaDataType type, const void* A,
    int64_t lda, cudaDataType, const void* S, cudaDataType, const void* U, int64_t ldu,
    cudaDataType, const void* V, int64_t ldv, cudaDataType, size_t* device_bytes,
    size_t* host_bytes) {
  *device_bytes = device_size(std::max(m, n), type);
  *host_bytes = host_size(n);
  return check("cusolverDnXgesvdr_bufferSize", handle, params,
               jobu == 'S' && jobv == 'S' && k > 0 && p >= 0 && k + p <= std::min(m, n),
               A && S && U && V, lda >= m && ldu >= m && ldv >= n);
}
cusolverStatus_t cusolverDnXgesvdr(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                   signed char jobu, signed char jobv, int64_t m, int64_t n,
                                   int64_t k, int64_t p, int64_t iterations, cudaDataType type,
                                   void* A, int64_t lda, cudaDataType, void* S, cudaDataType,
                                   void* U, int64_t ldu, cudaDataType, void* V, int64_t ldv,
                                   cudaDataType, void* device, size_t on_device, void* host,
                                   size_t on_host, int* info) {
  const char* name = "cusolverDnXgesvdr";
  record(name, m, n, k, p, iterations);
  if (const auto bad = check(name, handle, params,
                             jobu == 'S' && jobv == 'S' && k > 0 && p >= 0 &&
                                 k + p <= std::min(m, n) && iterations >= 0,
                             A && S && U && V && info, lda >= m && ldu >= m && ldv >= n))
    return bad;
  if (const auto bad = check_work(name, device, on_device, host, on_host,
                                  device_size(std::max(m, n), type), host_size(n)))
    return bad;
  const auto run = type == CUDA_R_64F ? store_svd<double> : store_svd<float>;
  run(m, n, A, lda, S, U, ldu, V, ldv, k);
  *info = told_info(0);
  return CUSOLVER_STATUS_SUCCESS;
}

#if FAKE_VERSION >= 11701
cusolverStatus_t cusolverDnSetDeterministicMode(cusolverDnHandle_t handle,
                                                cusolverDeterministicMode_t mode) {
  record("cusolverDnSetDeterministicMode", static_cast<int>(mode));
  return alive(handle) ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_NOT_INITIALIZED;
}
cusolverStatus_t cusolverDnXsyevBatched_bufferSize(
    cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t, cublasFillMode_t,
    int64_t n, cudaDataType type, const void* A, int64_t lda, cudaDataType, const void* W,
    cudaDataType, size_t* device_bytes, size_t* host_bytes, int64_t batch) {
  *device_bytes = device_size(n, type) + 16 * batch;
  *host_bytes = host_size(n);
  return check("cusolverDnXsyevBatched_bufferSize", handle, params,
               n > 0 && batch > 0 && fits_int32(n * lda, batch, type),
               A && W, lda >= n);
}
cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                        cusolverEigMode_t, cublasFillMode_t uplo, int64_t n,
                                        cudaDataType type, void* A, int64_t lda, cudaDataType,
                                        void* W, cudaDataType, void* device, size_t on_device,
                                        void* host, size_t on_host, int* info, int64_t batch) {
  const char* name = "cusolverDnXsyevBatched";
  record(name, n, lda, static_cast<int>(uplo), batch);
  if (const auto bad = check(name, handle, params,
                             n > 0 && batch > 0 && fits_int32(n * lda, batch, type),
                             A && W && info, lda >= n))
    return bad;
  if (const auto bad = check_work(name, device, on_device, host, on_host,
                                  device_size(n, type) + 16 * batch, host_size(n)))
    return bad;
  const int itemsize = type == CUDA_R_64F ? 8 : 4;
  for (int64_t b = 0; b < batch; ++b) {
    syev(type, uplo, n, static_cast<char*>(A) + b * n * lda * itemsize, lda,
         static_cast<char*>(W) + b * n * itemsize, 0);
    info[b] = told_info(static_cast<int>(b));
  }
  return CUSOLVER_STATUS_SUCCESS;
}
#endif

#if FAKE_VERSION >= 12200
cusolverStatus_t cusolverDnXpolar_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                             cublasFillMode_t, int64_t m, int64_t n,
                                             cudaDataType type, const void* A, int64_t lda,
                                             cudaDataType, const void* H, int64_t ldh,
                                             cudaDataType, size_t* device_bytes,
                                             size_t* host_bytes) {
  *device_bytes = device_size(m, type);
  *host_bytes = host_size(n);
  return check("cusolverDnXpolar_bufferSize", handle, params, m >= n && n > 0, A && H,
               lda >= m && ldh >= n);
}
cusolverStatus_t cusolverDnXpolar(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                  cublasFillMode_t uplo, int64_t m, int64_t n, cudaDataType type,
                                  void* A, int64_t lda, cudaDataType, void* H, int64_t ldh,
                                  cudaDataType, void* device, size_t on_device, void* host,
                                  size_t on_host, double* residual, double* norm, double* rcond,
                                  int* info) {
  const char* name = "cusolverDnXpolar";
  record(name, m, n, lda);
  if (const auto bad = check(name, handle, params,
                             m >= n && n > 0 && uplo == CUBLAS_FILL_MODE_FULL,
                             A && H && residual && norm && rcond && info, lda >= m && ldh >= n))
    return bad;
  if (const auto bad = check_work(name, device, on_device, host, on_host, device_size(m, type),
                                  host_size(n)))
    return bad;
  const auto run = type == CUDA_R_64F ? store_polar<double> : store_polar<float>;
  run(m, n, A, lda, H, ldh, residual, norm, rcond);
  *info = told_info(0);
  return CUSOLVER_STATUS_SUCCESS;
}
#endif

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  record("cudaMemcpyAsync", bytes, static_cast<int>(kind));
  if (const auto status = told("cudaMemcpyAsync")) return static_cast<cudaError_t>(status);
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  record("cudaStreamSynchronize", reinterpret_cast<std::uintptr_t>(stream));
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "the fake was told to fail"; }

}  // extern "C"

#if FAKE_VERSION >= 12200
#define SAME(name, result, arguments) \
  static_assert(std::is_same_v<decltype(name), result arguments>, #name);
RESM_CUSOLVER(SAME)
RESM_CUDART(SAME)
#endif
