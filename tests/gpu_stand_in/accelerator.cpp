/* A device for torch in place of a GPU, in the memory of the host: two of it, with streams, events and pinned memory.

   Kernels are those of the CPU and run at once. A copy to pinned memory that need not be waited for is made as late as
   possible: when somebody waits for its stream, or for an event recorded behind it. Until then pinned memory does not
   hold it, and it brings whatever the device's memory holds by then, as may happen with a GPU. */
#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/SDPBackend.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_copy_from_and_resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr int COUNT = 2;
using Key = std::pair<int, int64_t>; /* device and stream */

thread_local int current = 0;
thread_local int64_t streams[COUNT] = {};

std::recursive_mutex lock;
int64_t created = 0;
std::map<Key, std::deque<std::function<void()>>> queues; /* of copies and waits */
std::map<Key, int64_t> begun;                            /* how many of them were taken from a stream's queue */
int64_t late_copies = 0;
std::map<const char*, size_t> pinned;
size_t used = 0, peak = 0;

/* Holds the lock. What queues have held is freed without it: freeing a tensor may need Python's lock, and a thread that
   has that one may wait for this one. */
thread_local int depth = 0;
thread_local std::vector<std::function<void()>> spent;
struct Held {
    Held() {
        lock.lock();
        ++depth;
    }
    ~Held() {
        bool last = --depth == 0;
        lock.unlock();
        if (last) std::exchange(spent, {}).clear();
    }
};

struct Event {
    Key stream;
    int64_t place;
};

Key key(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }

void run_until(const Key& stream, int64_t place) {
    Held held;
    auto& queue = queues[stream];
    while (!queue.empty() && begun[stream] < place) {
        auto next = std::move(queue.front());
        queue.pop_front();
        begun[stream]++;
        next();
        spent.push_back(std::move(next));
    }
}

int64_t length(const Key& stream) { return begun[stream] + static_cast<int64_t>(queues[stream].size()); }

void finish(const Key& stream) {
    Held held;
    run_until(stream, length(stream));
}

/* ---- memory */

void release(void* memory) {
    Held held;
    used -= static_cast<size_t*>(memory)[-8];
    std::free(static_cast<char*>(memory) - 64);
}

struct DeviceMemory final : c10::DeviceAllocator {
    c10::DataPtr allocate(size_t size) override {
        Held held;
        c10::Device device(TYPE, static_cast<c10::DeviceIndex>(current));
        if (size == 0) return {nullptr, nullptr, &release, device};
        auto* block = static_cast<char*>(std::aligned_alloc(64, (size + 127) / 64 * 64));
        TORCH_CHECK(block != nullptr, "out of memory");
        *reinterpret_cast<size_t*>(block) = size;
        used += size;
        peak = std::max(peak, used);
        return {block + 64, block + 64, &release, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {}
    void recordStream(const c10::DataPtr&, c10::Stream) override {}
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
        c10::CachingDeviceAllocator::DeviceStats stats;
        stats.allocated_bytes[0].current = static_cast<int64_t>(used);
        stats.allocated_bytes[0].peak = static_cast<int64_t>(peak);
        return stats;
    }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex) override { peak = used; }
    std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {size_t(1) << 34, size_t(1) << 34}; }
};

void unpin(void* memory) {
    Held held;
    pinned.erase(static_cast<const char*>(memory));
    std::free(memory);
}

struct PinnedMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        Held held;
        auto* memory = std::aligned_alloc(64, (size + 127) / 64 * 64);
        pinned[static_cast<const char*>(memory)] = size;
        return {memory, memory, &unpin, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
    void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(TYPE, &device_memory);

bool is_pinned(const void* memory) {
    Held held;
    auto after = pinned.upper_bound(static_cast<const char*>(memory));
    if (after == pinned.begin()) return false;
    --after;
    return static_cast<const char*>(memory) < after->first + std::max<size_t>(after->second, 1);
}

/* ---- devices, streams and events */

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return TYPE; }
    c10::Device exchangeDevice(c10::Device to) const override {
        auto before = getDevice();
        setDevice(to);
        return before;
    }
    c10::Device getDevice() const override { return {TYPE, static_cast<c10::DeviceIndex>(current)}; }
    void setDevice(c10::Device to) const override { uncheckedSetDevice(to); }
    void uncheckedSetDevice(c10::Device to) const noexcept override {
        if (to.index() >= 0) current = to.index();
    }
    c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
    c10::Stream getStream(c10::Device of) const override {
        int index = of.index() < 0 ? current : of.index();
        return c10::Stream(c10::Stream::UNSAFE, c10::Device(TYPE, static_cast<c10::DeviceIndex>(index)), streams[index]);
    }
    c10::Stream getDefaultStream(c10::Device of) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
    c10::Stream getNewStream(c10::Device of, int) const override {
        Held held;
        return c10::Stream(c10::Stream::UNSAFE, of.index() < 0 ? getDevice() : of, ++created);
    }
    c10::Stream getStreamFromGlobalPool(c10::Device of, bool) const override { return getNewStream(of, 0); }
    c10::Stream exchangeStream(c10::Stream to) const override {
        auto before = getStream(to.device());
        streams[to.device_index()] = to.id();
        return before;
    }
    void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
        Held held;
        if (*event == nullptr) *event = new Event();
        *static_cast<Event*>(*event) = {key(stream), length(key(stream))};
    }
    void block(void* event, const c10::Stream& stream) const override {
        Held held;
        if (event == nullptr) return;
        queues[key(stream)].push_back([one = *static_cast<Event*>(event)] { run_until(one.stream, one.place); });
    }
    bool queryEvent(void* event) const override {
        synchronizeEvent(event);
        return true;
    }
    void synchronizeEvent(void* event) const override {
        if (auto* one = static_cast<Event*>(event)) run_until(one->stream, one->place);
    }
    void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
    bool queryStream(const c10::Stream& stream) const override {
        finish(key(stream));
        return true;
    }
    void synchronizeStream(const c10::Stream& stream) const override { finish(key(stream)); }
    void synchronizeDevice(c10::DeviceIndex index) const override {
        Held held;
        for (auto& [stream, queue] : queues)
            if (stream.first == index) finish(stream);
    }
    double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 1.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

/* Draws with a generator of the CPU, which kernels are given in its place. */
struct Generator final : c10::GeneratorImpl {
    at::Generator inner = at::detail::createCPUGenerator();

    static c10::DeviceType device_type() { return TYPE; }
    explicit Generator(c10::DeviceIndex index)
        : GeneratorImpl(c10::Device(TYPE, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
    void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
    void set_offset(uint64_t offset) override { inner.set_offset(offset); }
    uint64_t get_offset() const override { return inner.get_offset(); }
    uint64_t current_seed() const override { return inner.current_seed(); }
    uint64_t seed() override { return inner.unsafeGetGeneratorImpl()->seed(); }
    void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
    c10::GeneratorImpl* clone_impl() const override {
        auto* copy = new Generator(device().index());
        copy->inner = inner.clone();
        return copy;
    }
};

at::Generator& default_generator(c10::DeviceIndex index) {
    static at::Generator generators[COUNT] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
    return generators[index < 0 ? current : index];
}

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return COUNT; }
    void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
    c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current); }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
        auto before = getCurrentDevice();
        current = index;
        return before;
    }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
        return index < 0 ? getCurrentDevice() : exchangeDevice(index);
    }
    bool isPinnedPtr(const void* memory) const override { return is_pinned(memory); }
    at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
    const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
    at::Generator getNewGenerator(c10::DeviceIndex index) const override {
        return at::make_generator<Generator>(index < 0 ? getCurrentDevice() : index);
    }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
        auto* self = storage.unsafeGetStorageImpl();
        auto memory = device_memory.allocate(size);
        if (size && self->nbytes()) std::memcpy(memory.get(), self->data(), std::min(size, self->nbytes()));
        self->set_data_ptr_noswap(std::move(memory));
        self->set_nbytes(size);
    }
};
Hooks hooks;

/* ---- operators */

/* The same memory as a tensor of the CPU. */
at::Tensor on_cpu(const at::Tensor& tensor) {
    return at::from_blob(
        tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(c10::DeviceType::CPU));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    c10::OptionalDeviceGuard guard(device);
    c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
    return at::detail::empty_generic(size, &device_memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
    c10::OptionalDeviceGuard guard(device);
    c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
    return at::detail::empty_strided_generic(size, stride, &device_memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
    Guard guard;
    auto device = self.is_cpu() ? target.device() : self.device();
    auto stream = key(guard.getStream(device));
    bool to_host = target.is_cpu();
    bool late = to_host && non_blocking && self.dtype() == target.dtype() && is_pinned(target.data_ptr());
    auto copy = [source = self.is_cpu() ? self : on_cpu(self), held = self, into = to_host ? target : on_cpu(target),
                 kept = target]() {
        at::AutoDispatchBelowAutograd below;
        into.copy_(source);
    };
    if (late) {
        Held held;
        queues[stream].push_back(copy);
        late_copies++;
    } else {
        finish(stream);
        copy();
    }
    return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
    at::native::resize_(target, self.sizes());
    return copy_from(self, target, false);
}

at::Scalar local_scalar(const at::Tensor& self) { return on_cpu(self).item(); }

/* Streams keep their order: what is asked of one comes after its copies. */
void finish_current() { finish(key(Guard().getStream(c10::Device(TYPE, -1)))); }

c10::IValue aliased(const c10::IValue& value) {
    if (value.isTensor()) {
        const auto& tensor = value.toTensor();
        return tensor.defined() && !tensor.is_cpu() ? c10::IValue(on_cpu(tensor)) : value;
    }
    if (!value.isList()) return value;
    auto list = value.toList();
    c10::impl::GenericList found(list.elementType());
    for (const auto& one : list) found.push_back(aliased(one));
    return found;
}

c10::IValue moved(const c10::IValue& value, c10::Device device) {
    if (value.isTensor() && value.toTensor().defined()) return value.toTensor().to(device);
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> found;
    for (const at::Tensor& one : value.toTensorVector()) found.push_back(one.to(device));
    return found;
}

bool is_created(const c10::Argument& argument, const c10::IValue& value) {
    bool out = argument.alias_info() && argument.alias_info()->isWrite();
    return value.isDevice() || (out && value.isTensor() && value.toTensor().numel() == 0);
}

/* Run the kernel of the CPU in the memory where the tensors are, with the numbers of this device's generators. */
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    finish_current();
    const auto& arguments = op.schema().arguments();
    const auto& returns = op.schema().returns();
    auto values = torch::jit::last(*stack, arguments.size()).vec();
    c10::Device device(TYPE, static_cast<c10::DeviceIndex>(current));
    bool creates = false;
    for (size_t i = 0; i < values.size(); i++) {
        creates = creates || is_created(arguments[i], values[i]);
        if (values[i].isTensor() && values[i].toTensor().defined() && !values[i].toTensor().is_cpu())
            device = values[i].toTensor().device();
        if (arguments[i].name() != "generator") continue;
        auto chosen = values[i].isNone() ? default_generator(-1) : values[i].toGenerator();
        torch::jit::peek(*stack, i, values.size()) = at::check_generator<Generator>(chosen)->inner;
    }
    if (creates) return at::native::cpu_fallback(op, stack); /* which can resize */
    for (size_t i = 0; i < values.size(); i++) {
        auto& value = torch::jit::peek(*stack, i, values.size());
        value = aliased(value);
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    for (size_t i = 0; i < returns.size(); i++) {
        auto& value = torch::jit::peek(*stack, i, returns.size());
        size_t same = values.size();
        if (returns[i].alias_info() && returns[i].alias_info()->isWrite())
            for (same = 0; same < values.size(); same++)
                if (arguments[same].alias_info() && *arguments[same].alias_info() == *returns[i].alias_info()) break;
        value = same < values.size() ? values[same] : moved(value, device);
    }
}

/* A collective: that of the CPU, which finds the device's memory where it is. */
void collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    finish_current();
    auto count = op.schema().arguments().size();
    for (size_t i = 0; i < count; i++) {
        auto& value = torch::jit::peek(*stack, i, count);
        value = aliased(value);
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
    return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
    std::optional<int64_t> at = offset ? std::make_optional(offset->expect_int()) : std::nullopt;
    return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
    return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
    return at::native::set_storage_cpu_(
        self, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

/* ---- fused attention: where the CPU has it, that of the CPU */

using Maybe = std::optional<at::Tensor>;

Maybe on_cpu(const Maybe& tensor) { return tensor && tensor->defined() ? Maybe(on_cpu(*tensor)) : std::nullopt; }

int64_t attention_choice(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Maybe& mask,
                         double dropout, bool causal, std::optional<double> scale, bool grouped) {
    auto found = at::_fused_sdp_choice(
        on_cpu(query), on_cpu(key), on_cpu(value), on_cpu(mask), dropout, causal, scale, grouped);
    bool flash = found == static_cast<int64_t>(at::SDPBackend::flash_attention);
    return static_cast<int64_t>(flash ? at::SDPBackend::overrideable : at::SDPBackend::math);
}

auto attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Maybe& mask,
               double dropout, bool causal, bool, std::optional<double> scale) {
    finish_current();
    auto [mixed, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
        on_cpu(query), on_cpu(key), on_cpu(value), dropout, causal, on_cpu(mask), scale);
    auto to = query.device();
    at::Tensor none;
    return std::make_tuple(mixed.to(to), sums.to(to), none, none, c10::SymInt(query.size(2)), c10::SymInt(key.size(2)),
                           at::zeros({}, query.options().dtype(at::kLong)),
                           at::zeros({}, query.options().dtype(at::kLong)), none);
}

auto attention_backward(const at::Tensor& gradient, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const at::Tensor& mask, std::array<bool, 4>, const at::Tensor& mixed,
                        const at::Tensor& sums, const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt,
                        double dropout, bool causal, const at::Tensor&, const at::Tensor&,
                        std::optional<double> scale) {
    finish_current();
    auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        on_cpu(gradient), on_cpu(query), on_cpu(key), on_cpu(value), on_cpu(mixed), on_cpu(sums), dropout, causal,
        on_cpu(Maybe(mask)), scale);
    auto to = query.device();
    return std::make_tuple(of_query.to(to), of_key.to(to), of_value.to(to), at::Tensor());
}

} // namespace

/* Registered by torch's own macro, which has to be in its namespace. */
namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_choice)
}

namespace {

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", &empty);
    library.impl("empty_strided", &empty_strided);
    library.impl("_copy_from", &copy_from);
    library.impl("_copy_from_and_resize", &copy_from_and_resize);
    library.impl("_local_scalar_dense", &local_scalar);
    library.impl("resize_", &resize);
    library.impl("as_strided", &as_strided);
    library.impl("view", &view);
    library.impl("_reshape_alias", &reshape_alias);
    library.impl("unfold", &at::native::unfold);
    /* torch computes it from other operators where a device has no kernel of its own. */
    library.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
    library.impl("_fused_sdp_choice", &attention_choice);
    library.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
    library.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
    library.impl("set_.source_Tensor", &at::native::set_tensor_);
    library.impl("set_.source_Storage", &at::native::set_);
    library.impl("set_.source_Storage_storage_offset", &set_storage);
}

/* At this key, as torch has kernels at PrivateUse1 itself, which hand the tensors to a backend. */
TORCH_LIBRARY_IMPL(c10d, AutogradPrivateUse1, library) {
    for (const char* name : {"allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_", "broadcast_",
                             "allgather_into_tensor_coalesced_", "reduce_", "gather_", "scatter_", "reduce_scatter_",
                             "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "alltoall_", "alltoall_base_",
                             "send", "recv_", "recv_any_source_", "barrier"})
        library.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}

TORCH_LIBRARY(standin, library) {
    library.def("generator(int index) -> Generator?", [](int64_t index) { return default_generator(index); });
    library.def("late_copies() -> int", [] { return late_copies; });
}

const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

} // namespace
