// A stand-in for CUDA's driver: the entry points that paging uses, over host memory. Work on a stream is put off until something
// waits for it (mode 0) or, on side streams, done as soon as what it waits for is done (mode 1), so that a wait that is missing
// shows: a kernel that meets a page on the host counts as a fault, work on memory that was freed as an error.
// V1 leaves the calls with a CUmemLocation out, as drivers before 12.2 did.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {
constexpr uint64_t PAGE = 4096;
struct Event { bool done = true; struct Stream* stream = nullptr; };
struct Op { std::function<void()> run; Event* wait = nullptr; Event* mark = nullptr; };
struct Stream { bool side = true; std::deque<Op> queue; };
struct Alloc { uint64_t nbytes; bool managed; std::vector<char> on_device; };
struct Failure { int code, after; };

std::map<uint64_t, Alloc> allocs;
std::map<std::string, Failure> failures;
std::map<std::string, long> calls;
std::vector<Stream*> streams;
std::vector<Event*> graves;
Stream main_stream{false, {}};
long faults, errors, bytes_in, bytes_out, device_bytes, peak, limit;
int mode, concurrent;

int enter(const char* name) {
    calls[name]++;
    auto f = failures.find(name);
    if (f == failures.end()) return 0;
    return f->second.after-- > 0 ? 0 : f->second.code;
}
#define ENTER if (int code = enter(__func__)) return code

Alloc* find(uint64_t address, uint64_t nbytes, uint64_t* base) {
    auto it = allocs.upper_bound(address);
    if (it == allocs.begin()) return nullptr;
    --it;
    *base = it->first;
    return address + nbytes <= it->first + it->second.nbytes ? &it->second : nullptr;
}
Stream* of(void* handle) { return handle ? static_cast<Stream*>(handle) : &main_stream; }
void run_to(Stream* s, Event* until) {
    while (!s->queue.empty() && !(until && until->done)) {
        Op op = s->queue.front();
        s->queue.pop_front();
        if (op.wait && !op.wait->done) run_to(op.wait->stream, op.wait);
        if (op.run) op.run();
        if (op.mark) op.mark->done = true;
    }
}
void eager() {  // side streams go as far as they can without anybody's help
    for (bool moved = mode == 1; moved;) {
        moved = false;
        for (Stream* s : streams)
            while (!s->queue.empty() && !(s->queue.front().wait && !s->queue.front().wait->done)) {
                Op op = s->queue.front();
                s->queue.pop_front();
                if (op.run) op.run();
                if (op.mark) op.mark->done = true;
                moved = true;
            }
    }
}
void put(Stream* s, Op op) { s->queue.push_back(op); eager(); }
void migrate(uint64_t address, uint64_t nbytes, bool to_device) {
    uint64_t base;
    Alloc* a = find(address, nbytes, &base);
    if (!a || !a->managed) { errors++; return; }
    for (uint64_t p = (address - base) / PAGE; p <= (address + nbytes - 1 - base) / PAGE; p++) {
        if (a->on_device[p] == to_device) continue;
        if (to_device && device_bytes + (long)PAGE > limit) { errors++; return; }
        a->on_device[p] = to_device;
        device_bytes += to_device ? (long)PAGE : -(long)PAGE;
        (to_device ? bytes_in : bytes_out) += PAGE;
        peak = std::max(peak, device_bytes);
    }
}
int prefetch(uint64_t address, uint64_t nbytes, bool to_device, void* stream) {
    put(of(stream), {[=] { migrate(address, nbytes, to_device); }});
    return 0;
}
void sync_all() { run_to(&main_stream, nullptr); for (Stream* s : streams) run_to(s, nullptr); }
void* owned(uint64_t nbytes, bool managed) {
    void* p = aligned_alloc(PAGE, (nbytes + PAGE - 1) / PAGE * PAGE);
    memset(p, 0xAB, nbytes);
    allocs[(uint64_t)p] = {nbytes, managed, std::vector<char>(managed ? (nbytes + PAGE - 1) / PAGE : 0)};
    return p;
}
struct Location { int type, id; };
}  // namespace

extern "C" {
int cuGetErrorString(int code, const char** text) { *text = code == 2 ? "out of memory" : code == 801 ? "operation not supported" : "failure"; return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void** c) { *c = (void*)1; return 0; }
int cuCtxSynchronize() { sync_all(); return 0; }
int cuDeviceGetAttribute(int* value, int, int) { *value = concurrent; return 0; }
int cuMemAllocManaged(uint64_t* p, size_t n, unsigned) { ENTER; *p = (uint64_t)owned(n, true); return 0; }
int cuMemAlloc_v2(uint64_t* p, size_t n) { ENTER; if (device_bytes + (long)n > limit) return 2; device_bytes += n; peak = std::max(peak, device_bytes); *p = (uint64_t)owned(n, false); return 0; }
int cuMemHostAlloc(void** p, size_t n, unsigned) { ENTER; *p = owned(n, false); return 0; }
int cuMemHostGetDevicePointer_v2(uint64_t* d, void* p, unsigned) { *d = (uint64_t)p; return 0; }
int cuMemFree_v2(uint64_t p) {
    ENTER;
    auto it = allocs.find(p);
    if (it == allocs.end()) return 1;
    if (it->second.managed) device_bytes -= PAGE * std::count(it->second.on_device.begin(), it->second.on_device.end(), 1);
    else device_bytes -= it->second.nbytes;
    allocs.erase(it);  // the bytes themselves stay: work that comes too late is counted, not a crash
    return 0;
}
int cuMemFreeHost(void* p) { ENTER; return allocs.erase((uint64_t)p) ? 0 : 1; }
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t n, void* stream) {
    ENTER;
    put(of(stream), {[=] { uint64_t b; if (!find(to, n, &b) || !find(from, n, &b)) errors++; else memcpy((void*)to, (void*)from, n); }});
    return 0;
}
int cuMemsetD8Async(uint64_t p, unsigned char v, size_t n, void* stream) { put(of(stream), {[=] { uint64_t b; if (find(p, n, &b)) memset((void*)p, v, n); else errors++; }}); return 0; }
#ifdef V1
int cuMemAdvise(uint64_t, size_t, int, int) { ENTER; return 0; }
int cuMemPrefetchAsync(uint64_t p, size_t n, int device, void* s) { ENTER; return prefetch(p, n, device >= 0, s); }
#else
int cuMemAdvise_v2(uint64_t, size_t, int, Location) { ENTER; return 0; }
int cuMemPrefetchAsync_v2(uint64_t p, size_t n, Location where, unsigned, void* s) { ENTER; return prefetch(p, n, where.type == 1, s); }
#endif
int cuStreamCreate(void** s, unsigned) { auto* made = new Stream; streams.push_back(made); *s = made; return 0; }
int cuStreamDestroy_v2(void* s) { run_to(of(s), nullptr); streams.erase(std::find(streams.begin(), streams.end(), s)); return 0; }
int cuEventCreate(void** e, unsigned) { *e = new Event; return 0; }
int cuEventRecord(void* e, void* s) { ENTER; auto* event = (Event*)e; event->done = false; event->stream = of(s); put(of(s), {nullptr, nullptr, event}); return 0; }
int cuStreamWaitEvent(void* s, void* e, unsigned) { ENTER; put(of(s), {nullptr, (Event*)e, nullptr}); return 0; }
int cuEventDestroy_v2(void* e) { graves.push_back((Event*)e); return 0; }

// Adds value to n floats on the main stream: the kernel of the tests.
void mock_add(uint64_t p, size_t n, float value) {
    put(&main_stream, {[=] {
        uint64_t base;
        Alloc* a = find(p, n * 4, &base);
        if (!a) { errors++; return; }
        if (a->managed)
            for (uint64_t page = (p - base) / PAGE; page <= (p + n * 4 - 1 - base) / PAGE; page++) faults += !a->on_device[page];
        for (size_t i = 0; i < n; i++) ((float*)p)[i] += value;
    }});
}
void mock_reset(int m, int c, long device_limit) {
    sync_all();
    mode = m; concurrent = c; limit = device_limit;
    faults = errors = bytes_in = bytes_out = peak = 0;
    failures.clear(); calls.clear();
}
void mock_fail(const char* name, int code, int after) { failures[name] = {code, after}; }
long mock_calls(const char* name) { return calls[name]; }
long mock_count(int which) { long all[] = {faults, errors, bytes_in, bytes_out, device_bytes, peak, (long)allocs.size()}; return all[which]; }
void mock_sync() { sync_all(); }
}
