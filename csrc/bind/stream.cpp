#include "stream.hpp"

#include "../cpu/dispatch.hpp"
#include "../cpu/pool.hpp"
#include "arrays.hpp"
#include "step.hpp"

namespace py = pybind11;

namespace fastgd {
namespace {

struct Streams {
    Stream run;
    int64_t n;
    int parts, writes, narrow;
    char* read;
    char* write[1 + max_states];
};

void stream_part(void* context, int part) {
    const Streams& s = *static_cast<Streams*>(context);
    const int64_t begin = s.n / s.parts * part, end = part + 1 == s.parts ? s.n : s.n / s.parts * (part + 1);
    void* writes[1 + max_states];
    for (int k = 0; k < s.writes; ++k) writes[k] = s.write[k] + begin * (k == 0 ? s.narrow : 4);
    s.run(end - begin, s.read + begin * s.narrow, writes, 0);
}

// Reads `read`, reads and rewrites `writes`: dense arrays of one size. The first of `writes` has elements as wide as
// those of `read` (2 or 4 bytes), the others elements of 4 bytes.
void stream(py::handle read_, py::handle writes) {
    const Items items(writes);
    View r, w[1 + max_states];
    const int count = int(items.size());
    bool fine = count >= 1 && count <= 1 + max_states && read(read_.ptr(), r, false) && r.c_order;
    for (int k = 0; fine && k < count; ++k)
        fine = read(items[k], w[k], false) && w[k].c_order && w[k].writeable && w[k].size() == r.size() &&
               itemsize(w[k].dtype) == (k == 0 ? itemsize(r.dtype) : 4);
    if (!fine || itemsize(r.dtype) > 4)
        throw py::value_error("stream: expected dense arrays of one size, 2 or 4 bytes");
    Streams s{kernels().stream[itemsize(r.dtype) == 2][count - 1], r.size(), 1, count, itemsize(r.dtype), r.data, {}};
    for (int k = 0; k < count; ++k) s.write[k] = w[k].data;
    s.parts = parts_for(s.n * (2 * s.narrow + 4 * (count - 1)));
    py::gil_scoped_release release;
    parallel(s.parts, stream_part, &s);
}

}  // namespace

void register_stream(py::module_& m) { m.def("stream", &stream, py::arg("read"), py::arg("writes")); }

}  // namespace fastgd
