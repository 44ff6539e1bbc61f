// DLPack's C structs as far as they are read here; no package ships them alone. tests/test_dlpack.py holds them against
// the published header (github.com/dmlc/dlpack, version 1.3).
#pragma once
#include <stdint.h>

namespace fastgd::dlpack {

enum DeviceType : int32_t { cpu = 1, cuda = 2, cuda_host = 3, cuda_managed = 13 };
enum TypeCode : uint8_t { floating = 2, bfloat = 4 };

struct Device {
    DeviceType type;
    int32_t id;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;  // in elements
    uint64_t byte_offset;
};

struct Version {
    uint32_t major, minor;
};

struct ExchangeApiHeader {
    Version version;
    ExchangeApiHeader* prev_api;
};

// What the capsule type(x).__dlpack_c_exchange_api__ points to.
struct ExchangeApi {
    ExchangeApiHeader header;
    void (*managed_tensor_allocator)();
    void (*managed_tensor_from_py_object_no_sync)();
    void (*managed_tensor_to_py_object_no_sync)();
    int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);  // borrows; may be null
    int (*current_work_stream)(DeviceType type, int32_t id, void** stream);
};
constexpr const char* exchange_api_name = "dlpack_exchange_api";

}  // namespace fastgd::dlpack
