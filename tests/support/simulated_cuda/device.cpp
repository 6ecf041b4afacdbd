// A CUDA device over host memory. Each operation on CUDA tensors runs its CPU kernel over the same
// bytes. Streams are queues: what is issued runs at once, unless the stream has work pending.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream, c10::Storage;
using torch::jit::Stack;

extern "C" int PyGILState_Check();
extern "C" void* PyEval_SaveThread();
extern "C" void PyEval_RestoreThread(void*);

namespace {

// ---- streams, events -----------------------------------------------------------------------------

std::recursive_mutex mutex;
std::condition_variable_any changed;

// Never waits while it holds the GIL: who holds the mutex may run Python.
struct Lock {
  Lock() {
    if (mutex.try_lock()) return;
    void* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    mutex.lock();
    if (state) PyEval_RestoreThread(state);
  }
  ~Lock() { mutex.unlock(); }
};

using Work = std::function<bool()>;  // false: not yet

struct Queue {
  std::deque<Work> items;
  bool busy = false, side = false;
};

struct Event {
  Queue* queue;
  bool done = false;
  double ms = 0;
};
using EventPtr = std::shared_ptr<Event>;

const int n_devices = getenv("SIMULATED_CUDA_DEVICES") ? atoi(getenv("SIMULATED_CUDA_DEVICES")) : 1;
std::map<std::pair<int, c10::StreamId>, Queue> queues;
std::atomic<c10::StreamId> n_streams{0};
thread_local int current = 0;
thread_local std::map<int, c10::StreamId> current_stream;
std::set<int> touched;  // devices on which a context is open
bool deferred = false;
int fault = 0;  // planted: 1: no stream waits for an event; 2: nor does the host
void (*on_wait)(const char*) = nullptr;

void note(const std::string& what) {
  if (on_wait) on_wait(what.c_str());
}

int touch() {
  Lock lock;
  touched.insert(current);
  return current;
}

Queue& queue_of(const Stream& stream) {
  Lock lock;
  auto& queue = queues[{stream.device_index(), stream.id()}];
  queue.side = stream.id() != 0;
  return queue;
}

Stream stream_of(Device device) {
  const int index = device.index() < 0 ? current : device.index();
  return Stream(Stream::UNSAFE, Device(c10::kCUDA, index), current_stream[index]);
}

bool advance(Queue& queue) {  // by one item
  if (queue.busy || queue.items.empty()) return false;
  queue.busy = true;
  auto item = queue.items.front();
  bool done = false;
  try {
    done = item();
  } catch (...) {
    queue.busy = false;
    queue.items.pop_front();
    throw;
  }
  queue.busy = false;
  if (done) queue.items.pop_front();
  return done;
}

bool drain(Queue& queue) {
  Lock lock;
  while (advance(queue)) {
  }
  changed.notify_all();
  return queue.items.empty() || queue.busy;
}

void push(Queue& queue, const Work& item) {
  Lock lock;
  queue.items.push_back(item);
  if (!queue.side || queue.items.size() == 1) drain(queue);
}

template <class Done>
void wait_for(Queue& queue, Done done) {
  Lock lock;
  while (!done()) {
    if (advance(queue) || done()) continue;
    void* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    changed.wait_for(mutex, std::chrono::milliseconds(50));
    if (state) {
      mutex.unlock();
      PyEval_RestoreThread(state);
      mutex.lock();
    }
  }
}

void synchronize(Queue& queue) {
  wait_for(queue, [&] { return queue.items.empty() || queue.busy; });
}

void synchronize_device() {
  std::vector<Queue*> all;
  {
    Lock lock;
    for (auto& [key, queue] : queues)
      if (key.first == touch()) all.push_back(&queue);
  }
  for (auto* queue : all) synchronize(*queue);
}

// ---- memory --------------------------------------------------------------------------------------

struct Use {
  size_t now = 0, peak = 0, limit = size_t(80) << 30;
};
std::map<int, Use> used;
std::map<uintptr_t, size_t> pinned;  // begin → size
size_t n_pinned = 0, peak_pinned = 0;
bool capturing = false;

struct Block {  // what a CUDA storage owns; work that is pending shares only its memory
  Storage memory;
  int device;
  size_t bytes;
  Queue* queue;
  bool recorded = false;
};

void free_block(void* context) {
  Lock lock;
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  used[block->device].now -= block->bytes;
  if (block->queue->items.empty() && (block->memory.use_count() == 1 || !deferred)) return;
  // It lives until what is pending has used it: on streams that were recorded, or on its own alone,
  // where what comes next may overwrite it.
  const bool recorded = block->recorded;
  auto over = [memory = block->memory, recorded] {
    if (!recorded) memset(memory.mutable_data(), 0x7e, memory.nbytes());
    return true;
  };
  if (!recorded) push(*block->queue, over);
  for (auto& [key, queue] : queues)
    if (recorded && !queue.items.empty()) push(queue, over);
}

c10::DataPtr own(const Storage& memory, int device) {
  Lock lock;
  auto& use = used[device];
  const size_t bytes = (memory.nbytes() + 511) / 512 * 512;
  TORCH_CHECK_WITH(OutOfMemoryError, use.now + bytes <= use.limit, "CUDA out of memory. Tried to allocate ",
                   bytes, " bytes; ", use.limit - use.now, " of GPU ", device, " are free.");
  use.now += bytes;
  use.peak = std::max(use.peak, use.now);
  auto* block = new Block{memory, device, bytes, &queue_of(stream_of(Device(c10::kCUDA, device)))};
  return {memory.mutable_data(), block, &free_block, Device(c10::kCUDA, device)};
}

Storage host_storage(size_t bytes, c10::Allocator* allocator = c10::GetDefaultCPUAllocator()) {
  return Storage(Storage::use_byte_size_t(), bytes, allocator, true);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = host_storage(bytes);
    if (deferred && bytes) memset(memory.mutable_data(), 0, bytes);
    return own(memory, touch());
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} device_allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &device_allocator)

void pin(uintptr_t begin, size_t bytes) {
  Lock lock;
  touch();
  pinned[begin] = bytes;
  peak_pinned = std::max(peak_pinned, n_pinned += bytes);
}

void unpin(uintptr_t begin) {
  Lock lock;
  touch();
  n_pinned -= pinned[begin];
  pinned.erase(begin);
}

bool is_pinned(const void* data) {
  Lock lock;
  auto after = pinned.upper_bound(uintptr_t(data));
  return after != pinned.begin() && uintptr_t(data) < std::prev(after)->first + std::prev(after)->second;
}

struct PinnedAllocator final : c10::Allocator {  // as CachingHostAllocator: powers of two
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing");
    size_t size = 4096;
    while (size < bytes) size *= 2;
    void* data = aligned_alloc(4096, size);
    pin(uintptr_t(data), size);
    return {data, data, &release, c10::kCPU};
  }
  static void release(void* data) {
    unpin(uintptr_t(data));
    free(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} pinned_allocator;

// ---- operations ----------------------------------------------------------------------------------

Block* block_of(const Storage& storage) {
  const auto& data = storage.data_ptr();
  return data.get_deleter() == &free_block ? static_cast<Block*>(data.get_context()) : nullptr;
}

Tensor over(const Storage& storage, const Tensor& like, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

struct Call {
  std::vector<std::pair<Tensor, Tensor>> seen;  // on the host, as given
  int device = -1;

  Tensor host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      seen.emplace_back(tensor, tensor);
      return tensor;
    }
    device = tensor.get_device();
    auto* block = block_of(tensor.storage());
    auto found = over(block ? block->memory : host_storage(0), tensor, c10::DispatchKey::CPU);
    seen.emplace_back(found, tensor);
    return found;
  }

  Tensor given(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (auto& [host, cuda] : seen)
      if (host.is_same(tensor)) return cuda;
    for (auto& [host, cuda] : seen)
      if (cuda.is_cuda() && host.storage().is_alias_of(tensor.storage()))
        return over(cuda.storage(), tensor, c10::DispatchKey::CUDA);
    Storage storage(Storage::use_byte_size_t(), tensor.storage().nbytes(), own(tensor.storage(), device),
                    &device_allocator, true);
    return over(storage, tensor, c10::DispatchKey::CUDA);
  }

  void resized() {  // operations that change shapes in place do it to the host's tensor
    for (auto& [host, cuda] : seen) {
      if (!cuda.is_cuda()) continue;
      auto* storage = cuda.storage().unsafeGetStorageImpl();
      if (storage->data_ptr().get() != host.storage().data_ptr().get()) {
        if (auto* block = block_of(cuda.storage())) block->recorded = true;  // its memory goes on
        storage->set_data_ptr_noswap(own(host.storage(), cuda.get_device()));
        storage->set_nbytes(host.storage().nbytes());
      }
      if (host.sizes() != cuda.sizes() || host.strides() != cuda.strides())
        cuda.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

template <class F>
c10::IValue each_tensor(const c10::IValue& value, F f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(f(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<Tensor>(f(*t)) : std::nullopt);
    return list;
  }
  return value;
}

const std::set<std::string> waiting{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::is_nonzero"};

void run(const c10::OperatorHandle& op, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(op.operator_name());
  Call call;
  bool masks = false;  // indices that are masks: their number is read
  auto arguments = torch::jit::last(*stack, schema.arguments().size()).vec();
  for (auto& value : arguments) {
    if (value.isDevice() && value.toDevice().is_cuda()) {
      call.device = value.toDevice().has_index() ? value.toDevice().index() : touch();
      value = Device(c10::kCPU);
    }
    const bool indices = value.isOptionalTensorList();
    value = each_tensor(value, [&](const Tensor& t) {
      masks |= indices && t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
      return call.host(t);
    });
  }
  torch::jit::drop(*stack, schema.arguments().size());
  if (call.device < 0) call.device = touch();
  auto& queue = queue_of(stream_of(Device(c10::kCUDA, call.device)));

  bool writes = false, views = false, reads = masks || waiting.count(name), fresh = false;
  for (const auto& argument : schema.arguments())
    writes |= argument.alias_info() && argument.alias_info()->isWrite();
  for (const auto& result : schema.returns()) {
    views |= result.alias_info() && !result.alias_info()->isWrite();
    fresh |= !result.alias_info();
  }
  bool now = views;
  if (name == "aten::copy_" && arguments[0].toTensor().numel()) {
    auto& [to, given_to] = call.seen[0];
    auto& [from, given_from] = call.seen[1];
    if (given_to.is_cuda() != given_from.is_cuda()) {
      const bool pageable = !is_pinned((given_to.is_cuda() ? from : to).const_data_ptr());
      if (arguments[2].toBool() && !pageable) {
        auto copy = [to = to, from = from] {
          at::AutoDispatchBelowADInplaceOrView below;
          to.copy_(from);
          return true;
        };
        Lock lock;
        if (deferred || !drain(queue)) queue.items.push_back(copy);
        else copy();
        stack->push_back(given_to);
        return;
      }
      reads = true;
    }
  }
  if (reads) {
    note(name + (name == "aten::copy_" ? " between host and device" : ""));
    synchronize(queue);
    now = true;
  }
  for (auto& [host, cuda] : call.seen) now |= writes && cuda.is_cuda() && !host.numel();
  if (now || queue.busy || (queue.side ? queue.items.empty() : drain(queue))) {
    stack->insert(stack->end(), arguments.begin(), arguments.end());
    run(op, stack);
    call.resized();
    for (auto& value : torch::jit::last(*stack, schema.returns().size()))
      const_cast<c10::IValue&>(value) = each_tensor(value, [&](const Tensor& t) { return call.given(t); });
    return;
  }
  // The stream has work pending. What results has the shape that the stale values give.
  Stack results;
  if (!writes || fresh) {
    results = arguments;
    run(op, &results);
  } else {
    for (size_t i = 0; i < arguments.size() && results.size() < schema.returns().size(); i++)
      if (schema.arguments()[i].alias_info()) results.push_back(arguments[i]);
  }
  push(queue, [op, arguments, results, writes] {
    Stack again(arguments);
    run(op, &again);
    for (size_t i = 0; !writes && i < results.size(); i++) {
      std::vector<Tensor> from, to;
      each_tensor(again[i], [&](const Tensor& t) { return from.push_back(t), t; });
      each_tensor(results[i], [&](const Tensor& t) { return to.push_back(t), t; });
      at::AutoDispatchBelowADInplaceOrView below;
      for (size_t k = 0; k < to.size(); k++)
        if (to[k].defined()) to[k].copy_(from[k]);
    }
    return true;
  });
  for (const auto& value : results)
    stack->push_back(each_tensor(value, [&](const Tensor& t) { return call.given(t); }));
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(c10::kCUDA)));
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(c10::kCUDA)));
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& set_storage(Tensor& self, Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

void record_stream(Tensor& self, Stream stream) {
  if (auto* block = block_of(self.storage())) block->recorded = true;
}

Tensor& mm(const Tensor& a, const Tensor& b, at::ScalarType, Tensor& out) {
  return out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
}

Tensor& addmm(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType, const at::Scalar& beta,
              const at::Scalar& alpha, Tensor& out) {
  return out.copy_(at::addmm(self.to(at::kFloat), a.to(at::kFloat), b.to(at::kFloat), beta, alpha));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("record_stream", record_stream);
  m.impl("mm.dtype_out", mm);
  m.impl("addmm.dtype_out", addmm);
}

// ---- what torch asks of a device -----------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return c10::kCUDA; }
  Device getDevice() const override { return Device(c10::kCUDA, current); }
  Device exchangeDevice(Device d) const override {
    auto before = getDevice();
    setDevice(d);
    return before;
  }
  void setDevice(Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.has_index()) current = d.index();
  }
  DeviceIndex deviceCount() const noexcept override { return n_devices; }
  Stream getStream(Device d) const override { return stream_of(d); }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getNewStream(Device d, int) const override {
    return Stream(Stream::UNSAFE, Device(c10::kCUDA, d.has_index() ? d.index() : current), ++n_streams);
  }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  Stream exchangeStream(Stream s) const override {
    auto before = stream_of(s.device());
    current_stream[s.device_index()] = s.id();
    return before;
  }
  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    auto made = std::make_shared<Event>(Event{&queue_of(stream)});
    if (*event) *static_cast<EventPtr*>(*event) = made;
    else *event = new EventPtr(made);
    push(*made->queue, [made] {
      const std::chrono::duration<double, std::milli> now = std::chrono::steady_clock::now().time_since_epoch();
      made->ms = now.count();
      return made->done = true;
    });
  }
  void block(void* event, const Stream& stream) const override {
    if (!event || fault == 1) return;
    push(queue_of(stream), [event = *static_cast<EventPtr*>(event)] {
      while (!event->done && advance(*event->queue)) {
      }
      return event->done;
    });
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    auto known = *static_cast<EventPtr*>(event);
    return known->done || (drain(*known->queue), known->done);
  }
  void synchronizeEvent(void* event) const override {
    touch();
    if (!event || fault == 2) return;
    auto known = *static_cast<EventPtr*>(event);
    note("event.synchronize");
    wait_for(*known->queue, [&] { return known->done; });
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<EventPtr*>(event); }
  double elapsedTime(void* a, void* b, const DeviceIndex) const override {
    TORCH_CHECK(a && b, "an event was not recorded");
    auto &begin = *static_cast<EventPtr*>(a), &end = *static_cast<EventPtr*>(b);
    TORCH_CHECK(begin->done && end->done, "an event is not done");
    return end->ms - begin->ms;
  }
  bool queryStream(const Stream& stream) const override { return drain(queue_of(stream)); }
  void synchronizeStream(const Stream& stream) const override {
    note("stream.synchronize");
    synchronize(queue_of(stream));
  }
  void synchronizeDevice(const DeviceIndex) const override {
    note("device.synchronize");
    synchronize_device();
  }
  // No "override": torch 2.11 does not declare it.
  bool isStreamCapturing(const Stream&) const { return capturing; }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream&) const override {
    if (data.get_deleter() == &free_block) static_cast<Block*>(data.get_context())->recorded = true;
  }
};
}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex device) const override { return touched.count(device); }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  int getNumGPUs() const override { return n_devices; }
  DeviceIndex deviceCount() const override { return n_devices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, current); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  void deviceSynchronize(DeviceIndex) const override { synchronize_device(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// ---- what the Python side asks -------------------------------------------------------------------

extern "C" {
int sim_exchange(int device) { return device < 0 ? current : std::exchange(current, device); }
void sim_on_wait(void (*callback)(const char*)) { on_wait = callback; }
void sim_defer(bool on) { deferred = on; }
void sim_capturing(bool on) { capturing = on; }
void sim_fault(int kind) { fault = kind; }
bool sim_touched(int device) { return device < 0 ? (touched.clear(), false) : touched.count(device); }
void sim_pin(uintptr_t begin, size_t bytes) { pin(begin, bytes); }
void sim_unpin(uintptr_t begin) { unpin(begin); }
size_t sim_peak_pinned(bool reset) { return reset ? peak_pinned = n_pinned : peak_pinned; }
size_t sim_used(int device, int what) {
  Lock lock;
  auto& use = used[device];
  if (what == 2) use.peak = use.now;
  return what == 0 ? use.now : what == 1 ? use.peak : use.limit;
}
void sim_limit(int device, size_t bytes) { used[device].limit = bytes; }
bool sim_ready() {  // whether what is launched now may run now; else it is to be pushed
  auto& queue = queue_of(stream_of(Device(c10::kCUDA, current)));
  Lock lock;
  return queue.busy || (queue.side ? queue.items.empty() : drain(queue));
}
void sim_push(bool (*work)()) { push(queue_of(stream_of(Device(c10::kCUDA, current))), work); }
}
