#include "array.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace resm {
namespace {

constexpr std::int64_t INT32 = std::numeric_limits<std::int32_t>::max();
// XsyevBatched has refused 40000 small matrices and taken 16384 (mujocolab/mjlab #732).
constexpr std::int64_t MOST_MATRICES = 16384;

std::string text(const std::vector<std::int64_t>& numbers) {
  std::string result = "(";
  for (std::size_t i = 0; i < numbers.size(); ++i)
    result += (i ? ", " : "") + std::to_string(numbers[i]);
  return result + ")";
}

}  // namespace

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

Array::Array(std::uintptr_t pointer, const std::string& kind, std::vector<std::int64_t> shape_,
             std::vector<std::int64_t> strides_)
    : data(reinterpret_cast<char*>(pointer)),
      type(kind.empty() ? '?' : kind[0]),
      itemsize(kind == "f8" ? 8 : 4),
      shape(std::move(shape_)),
      strides(std::move(strides_)) {
  expect(kind == "f4" || kind == "f8" || kind == "i4", "kind " + kind + ": expected f4, f8 or i4");
  expect(pointer != 0, "a null pointer");
  expect(pointer % itemsize == 0, "a pointer that is not aligned to its elements");
  expect(shape.size() == strides.size(), "a shape " + text(shape) + " with strides " + text(strides));
  std::int64_t last = 0;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    std::int64_t reach = 0;
    expect(shape[i] > 0, "an empty or negative shape " + text(shape));
    expect(strides[i] >= 0 && !__builtin_mul_overflow(shape[i] - 1, strides[i], &reach) &&
               !__builtin_add_overflow(last, reach, &last) &&
               last < std::numeric_limits<std::int64_t>::max() / itemsize,
           "strides " + text(strides) + " that leave the address space for shape " + text(shape));
  }
}

namespace {

// A row of more than one entry lies both by rows and by columns: as an input it is a tall
// problem by rows, which more solvers take.
Matrices read(const Array& array, const char* name, bool as_input) {
  const auto dims = array.shape.size();
  expect(array.type == 'f', std::string(name) + ": expected float32 or float64");
  expect(dims == 2 || dims == 3, std::string(name) + ": expected a matrix or a batch of matrices, got shape " +
                                     text(array.shape));
  const std::int64_t m = array.shape[dims - 2], n = array.shape[dims - 1];
  const std::int64_t down = array.strides[dims - 2], across = array.strides[dims - 1];
  const bool by_columns = (m == 1 || down == 1) && (n == 1 || across >= m);
  const bool by_rows = (n == 1 || across == 1) && (m == 1 || down >= n);
  expect(by_columns || by_rows, std::string(name) + ": expected rows or columns that are contiguous, got shape " +
                                    text(array.shape) + " with strides " + text(array.strides));
  const bool transposed = by_rows && (!by_columns || (as_input && n > m));
  Matrices found{array.data, dims == 3 ? array.shape[0] : 1, m, n, n == 1 ? m : across, 0,
                 transposed};
  if (found.transposed) {
    std::swap(found.rows, found.columns);
    found.ld = m == 1 ? n : down;
  }
  found.step = found.ld * found.columns;
  if (found.batch > 1) {
    expect(array.strides[0] >= found.step - (found.ld - found.rows),
           std::string(name) + ": the matrices of the batch overlap: shape " + text(array.shape) +
               " with strides " + text(array.strides));
    found.step = array.strides[0];
  }
  return found;
}

}  // namespace

Matrices matrices(const Array& array, const char* name) { return read(array, name, true); }

Matrices output(const Array& array, const char* name, const Array& like, std::int64_t batch,
                std::int64_t rows, std::int64_t columns) {
  const Matrices found = read(array, name, false);
  expect(array.itemsize == like.itemsize, std::string(name) + ": expected the dtype of the input");
  const bool fits = found.batch == batch && !found.transposed && found.rows == rows &&
                    found.columns == columns;
  expect(fits, std::string(name) + ": expected " + text({batch, rows, columns}) +
                   " with contiguous columns, got shape " + text(array.shape) + " with strides " +
                   text(array.strides));
  return found;
}

char* vectors(const Array& array, const char* name, char type, int itemsize, std::int64_t batch,
              std::int64_t count) {
  expect(array.type == type && array.itemsize == itemsize, std::string(name) + ": wrong dtype");
  const auto dims = array.shape.size();
  const bool fits = (dims == 2 && array.shape[0] == batch && array.shape[1] == count &&
                     (batch == 1 || array.strides[0] == count) &&
                     (count == 1 || array.strides[1] == 1));
  expect(fits, std::string(name) + ": expected " + text({batch, count}) +
                   ", contiguous, got shape " + text(array.shape) + " with strides " +
                   text(array.strides));
  return array.data;
}

int as_int(std::int64_t value, const char* name) {
  expect(value <= INT32, std::string(name) + " = " + std::to_string(value) + " passes int32");
  return static_cast<int>(value);
}

std::int64_t batch_per_call(std::int64_t batch, const std::vector<std::int64_t>& steps,
                            std::int64_t itemsize) {
  const std::int64_t largest = *std::max_element(steps.begin(), steps.end());
  expect(largest <= INT32, "a matrix of " + std::to_string(largest) +
                               " elements: this solver counts them in int32");
  const std::int64_t fitting = std::max<std::int64_t>(1, INT32 / (largest * itemsize));
  return std::min({batch, MOST_MATRICES, fitting});
}

}  // namespace resm
