// A device of type CUDA on a machine without one, for rehearsing GPU code: see tools/rehearse.py.
//
// Tensors on it are CUDA tensors to torch (dispatch, autograd's device thread, autocast, device checks), over host
// memory; operations run as the CPU's, on aliases of that memory. What a GPU would not forgive raises here: tensors of
// two devices in one operation, waiting for the device inside a capture. Memory that nothing wrote holds NaN. A copy
// between host and device on a side stream runs as late as the stream may run it; a captured graph runs nothing while
// it is captured, and its replays read and write the captured memory. Allocations, launches and waits are counted.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <unordered_set>

namespace {
using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

// ---------------------------------------------------------------- memory
std::mutex memory_lock;
std::unordered_map<void*, size_t> blocks;
int64_t allocated = 0, peak = 0, limit = 0;

// The caching allocator hands out multiples of this.
int64_t rounded(int64_t bytes) { return (bytes + 511) / 512 * 512; }

void account(int64_t bytes) {
  allocated += bytes;
  peak = std::max(peak, allocated);
}

void release(void* pointer) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto found = blocks.find(pointer);
  if (found == blocks.end()) return;
  account(-rounded(static_cast<int64_t>(found->second)));
  blocks.erase(found);
  std::free(pointer);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    std::lock_guard<std::mutex> guard(memory_lock);
    TORCH_CHECK_WITH(OutOfMemoryError, limit == 0 || allocated + rounded(static_cast<int64_t>(bytes)) <= limit,
                     "CUDA out of memory (simulated). Tried to allocate ", bytes, " bytes");
    if (bytes == 0) return {nullptr, nullptr, &release, kDevice};
    void* pointer = nullptr;
    TORCH_CHECK(posix_memalign(&pointer, 512, bytes) == 0, "no memory");
    std::memset(pointer, 0xff, bytes);  // what is not written is NaN
    blocks[pointer] = bytes;
    account(rounded(static_cast<int64_t>(bytes)));
    return {pointer, pointer, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
} device_allocator;

std::map<const char*, size_t> pinned;  // by address
void unpin(void* pointer) {
  std::lock_guard<std::mutex> guard(memory_lock);
  pinned.erase(static_cast<const char*>(pointer));
  std::free(pointer);
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    std::lock_guard<std::mutex> guard(memory_lock);
    void* pointer = nullptr;
    TORCH_CHECK(posix_memalign(&pointer, 512, std::max<size_t>(bytes, 1)) == 0, "no memory");
    pinned[static_cast<const char*>(pointer)] = std::max<size_t>(bytes, 1);
    return {pointer, pointer, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
} pinned_allocator;

bool is_pinned_pointer(const void* data) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  --after;
  return static_cast<const char*>(data) < after->first + after->second;
}

// ---------------------------------------------------------------- device, hooks
thread_local int64_t current_stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, current_stream);
  }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = current_stream;
    current_stream = stream.id();
    return c10::Stream(c10::Stream::UNSAFE, kDevice, before);
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

at::Generator& default_generator() {
  static at::Generator generator = at::detail::createCPUGenerator(1);
  return generator;
}

bool hand_out_default = true;  // the first is torch.cuda.default_generators[0]

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return std::exchange(hand_out_default, false) ? default_generator() : at::detail::createCPUGenerator();
  }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* data) const override { return is_pinned_pointer(data); }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

// ---------------------------------------------------------------- streams, capture
std::recursive_mutex work_lock;
std::unordered_map<int64_t, std::deque<std::pair<int64_t, std::function<void()>>>> queued;
int64_t tickets = 0;

void run_until(int64_t stream, int64_t ticket) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  auto& work = queued[stream];
  while (!work.empty() && work.front().first <= ticket) {
    auto next = std::move(work.front().second);
    work.pop_front();
    next();
  }
}

struct Capture {
  std::vector<std::function<void()>> work;
  std::unordered_set<const void*> own;                             // storages made while capturing
  std::unordered_map<const void*, std::function<void()>> restore;  // of those that were there before
};
std::shared_ptr<Capture> capturing;
int64_t capture_stream = -1;
int64_t sync_errors = 0;  // torch.cuda.set_sync_debug_mode("error")
std::map<std::string, int64_t> sync_names;
std::map<std::string, int64_t> launches;

bool in_capture() { return capturing && current_stream == capture_stream; }

void waits_for_device(const std::string& what) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  TORCH_CHECK(!in_capture(), "CUDA error (simulated): operation not permitted when stream is capturing: ", what);
  TORCH_CHECK(!sync_errors, "called a synchronizing CUDA operation: ", what);
  ++sync_names[what];
  if (current_stream != 0) run_until(current_stream, tickets);
}

void will_write(const at::Tensor& tensor) {
  if (!in_capture()) return;
  auto storage = tensor.storage();
  const void* key = storage.unsafeGetStorageImpl();
  if (capturing->own.count(key) || capturing->restore.count(key)) return;
  auto bytes = std::make_shared<std::string>(static_cast<const char*>(storage.data()), storage.nbytes());
  capturing->restore[key] = [storage, bytes]() {
    std::memcpy(storage.mutable_data(), bytes->data(), std::min(bytes->size(), storage.nbytes()));
  };
}

// ---------------------------------------------------------------- aliases between the devices
at::Tensor make_alias(c10::Storage storage, const at::Tensor& like, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor host_view(const at::Tensor& tensor) {
  auto storage = tensor.storage();
  auto* holder = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), holder, [](void* h) { delete static_cast<c10::Storage*>(h); }, at::kCPU);
  c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                    c10::GetAllocator(c10::DeviceType::CPU), true);
  return make_alias(std::move(host), tensor, DispatchKey::CPU);
}

struct Adopted {
  at::Tensor tensor;
  int64_t bytes;
};
at::Tensor device_tensor(const at::Tensor& result) {
  auto bytes = rounded(static_cast<int64_t>(result.storage().nbytes()));
  {
    std::lock_guard<std::mutex> guard(memory_lock);
    TORCH_CHECK_WITH(OutOfMemoryError, limit == 0 || allocated + bytes <= limit, "CUDA out of memory (simulated)");
    account(bytes);
  }
  auto* holder = new Adopted{result, bytes};
  c10::DataPtr data(
      result.storage().mutable_data(), holder,
      [](void* h) {
        auto* adopted = static_cast<Adopted*>(h);
        {
          std::lock_guard<std::mutex> guard(memory_lock);
          account(-adopted->bytes);
        }
        delete adopted;
      },
      kDevice);
  c10::Storage storage(c10::Storage::use_byte_size_t(), result.storage().nbytes(), std::move(data), &device_allocator,
                       true);
  return make_alias(std::move(storage), result, DispatchKey::CUDA);
}

// ---------------------------------------------------------------- operations
const std::set<std::string> kSyncs = {"aten::nonzero",
                                      "aten::masked_select",
                                      "aten::_unique2",
                                      "aten::equal",
                                      "aten::unique_dim",
                                      "aten::unique_consecutive",
                                      "aten::repeat_interleave.Tensor",
                                      "aten::nonzero_static",
                                      "aten::_linalg_check_errors",
                                      "aten::bincount",
                                      "aten::histc",
                                      "aten::_assert_async_sync"};
const std::set<std::string> kMayMix = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
                                       "aten::index_put", "aten::_unsafe_index.Tensor"};

void execute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const std::string name =
      schema.operator_name().name + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  if (kSyncs.count(name)) waits_for_device(name);
  const auto count = schema.arguments().size();
  const auto base = stack->size() - count;
  struct Given {
    at::Tensor device, host;
    bool written;
  };
  std::vector<Given> given;
  auto converted = [&](const at::Tensor& tensor, bool written) -> at::Tensor {
    if (!tensor.defined() || !tensor.is_cuda()) {
      if (tensor.defined() && tensor.dim() > 0 && !kMayMix.count(name)) {
        TORCH_CHECK(false,
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    "(simulated, ",
                    name, ")");
      }
      if (tensor.defined() && tensor.dim() > 0 && kMayMix.count(name))
        waits_for_device(name + " with an index on the host");
      return tensor;
    }
    if (written) will_write(tensor);
    auto host = host_view(tensor);
    given.push_back({tensor, host, written});
    return host;
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[base + i];
    const auto& argument = schema.arguments()[i];
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      auto tensor = value.toTensor();
      if (name.rfind("aten::index", 0) == 0 && tensor.defined() && tensor.scalar_type() == at::kBool)
        waits_for_device(name);
      value = converted(tensor, written);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& one : value.toTensorVector()) list.push_back(converted(one, written));
      value = c10::List<at::Tensor>(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& one : value.toOptionalTensorList().vec()) {
        if (one.has_value() && one->defined() && one->scalar_type() == at::kBool)
          waits_for_device(name + " with a mask");
        list.push_back(one.has_value() ? std::optional<at::Tensor>(converted(*one, written)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    } else if (value.isNone() && argument.type()->kind() == c10::TypeKind::OptionalType &&
               argument.type()->castRaw<c10::OptionalType>()->getElementType()->kind() ==
                   c10::TypeKind::GeneratorType) {
      value = IValue(default_generator());
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  for (auto& one : given) {
    if (!one.written) continue;
    if (one.host.sizes() != one.device.sizes() || one.host.storage().data() != one.device.storage().data()) {
      at::native::resize_output(one.device, one.host.sizes());
      host_view(one.device).copy_(one.host);
    } else if (one.host.strides() != one.device.strides()) {
      one.device.unsafeGetTensorImpl()->set_sizes_and_strides(one.host.sizes(), one.host.strides());
    }
  }
  const auto results = schema.returns().size();
  const auto first = stack->size() - results;
  auto returned = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    for (auto& one : given) {
      if (one.host.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) return one.device;
    }
    for (auto& one : given) {
      if (tensor.storage().data() && one.host.storage().data() == tensor.storage().data()) {
        return make_alias(one.device.storage(), tensor, DispatchKey::CUDA);
      }
    }
    return device_tensor(tensor);
  };
  for (size_t i = 0; i < results; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = returned(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& one : value.toTensorVector()) list.push_back(returned(one));
      value = c10::List<at::Tensor>(list);
    }
  }
}

void tensors_of(const IValue& value, std::vector<at::Tensor>& out) {
  if (value.isTensor()) {
    out.push_back(value.toTensor());
  } else if (value.isTensorList()) {
    for (const auto& one : value.toTensorVector()) out.push_back(one);
  }
}

// What an argument is now: `tensor.data = other` may make it another later.
at::Tensor frozen(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cuda() ? make_alias(tensor.storage(), tensor, DispatchKey::CUDA) : tensor;
}

IValue frozen(const IValue& value) {
  if (value.isTensor()) return frozen(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& one : value.toTensorVector()) list.push_back(frozen(one));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& one : value.toOptionalTensorList().vec())
      list.push_back(one.has_value() ? std::optional<at::Tensor>(frozen(*one)) : std::nullopt);
    return list;
  }
  return value;
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  run_until(current_stream, tickets);
  ++launches[op.schema().operator_name().name];
  if (!in_capture()) {
    execute(op, stack);
    return;
  }
  const auto count = op.schema().arguments().size();
  Stack inputs;
  for (auto value = stack->end() - count; value != stack->end(); ++value) inputs.push_back(frozen(*value));
  std::unordered_set<const void*> before;
  for (const auto& value : inputs) {
    std::vector<at::Tensor> found;
    tensors_of(value, found);
    for (auto& one : found)
      if (one.defined() && one.has_storage()) before.insert(one.storage().unsafeGetStorageImpl());
  }
  execute(op, stack);
  const auto results = op.schema().returns().size();
  Stack outputs;  // as they are: autograd is about to tie the tensors themselves to its graph
  for (auto value = stack->end() - results; value != stack->end(); ++value) outputs.push_back(frozen(*value));
  for (const auto& value : outputs) {
    std::vector<at::Tensor> found;
    tensors_of(value, found);
    for (auto& one : found)
      if (one.defined() && !before.count(one.storage().unsafeGetStorageImpl()))
        capturing->own.insert(one.storage().unsafeGetStorageImpl());
  }
  capturing->work.push_back([op, inputs, outputs, results]() {
    Stack again = inputs;
    execute(op, &again);
    for (size_t i = 0; i < results; ++i) {
      std::vector<at::Tensor> fresh, kept;
      tensors_of(again[again.size() - results + i], fresh);
      tensors_of(outputs[i], kept);
      for (size_t k = 0; k < kept.size(); ++k) {
        if (!kept[k].defined() || fresh[k].storage().data() == kept[k].storage().data()) continue;
        host_view(kept[k]).copy_(host_view(fresh[k]));
      }
    }
  });
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  at::Tensor made = at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(DispatchKey::CUDA),
                                              c10::dtype_or_default(dtype), format);
  if (in_capture()) capturing->own.insert(made.storage().unsafeGetStorageImpl());
  return made;
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  at::Tensor made = at::detail::empty_strided_generic(
      size, stride, &device_allocator, c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
  if (in_capture()) capturing->own.insert(made.storage().unsafeGetStorageImpl());
  return made;
}

at::Tensor on_host(const at::Tensor& tensor) { return tensor.is_cuda() ? host_view(tensor) : tensor; }

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  ++launches["aten::copy_"];
  const bool crosses = self.is_cuda() != source.is_cuda();
  const auto& host = self.is_cuda() ? source : self;
  const bool is_async = !crosses || (non_blocking && is_pinned_pointer(host.storage().data()));
  if (!is_async) waits_for_device(self.is_cuda() ? "copy from the host" : "copy to the host");
  if (self.is_cuda()) will_write(self);
  auto work = [self = frozen(self), source = frozen(source)]() {
    at::Tensor to = on_host(self);
    to.copy_(on_host(source));
  };
  if (in_capture()) capturing->work.push_back(work);
  if (current_stream != 0 && !in_capture() && is_async && crosses) {
    queued[current_stream].emplace_back(++tickets, work);  // as late as a stream may run it
    return self;
  }
  run_until(current_stream, tickets);
  work();
  return self;
}

at::Scalar local_scalar(const at::Tensor& self) {
  waits_for_device("item");
  return host_view(self).item();
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_storage_offset(offset.expect_int());
  std::vector<int64_t> sizes, strides;
  for (const auto& one : size) sizes.push_back(one.expect_int());
  for (const auto& one : stride) strides.push_back(one.expect_int());
  if (strides.empty() && !sizes.empty()) {
    self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  } else {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, c10::SymIntArrayRef({c10::SymInt(count)}), {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source.storage());
  self.unsafeGetTensorImpl()->set_storage_offset(source.storage_offset());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides());
  return self;
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  std::vector<int64_t> sizes;
  for (const auto& one : size) sizes.push_back(one.expect_int());
  auto* impl = self.unsafeGetTensorImpl();
  int64_t numel = 1;
  for (auto one : sizes) numel *= one;
  auto needed = static_cast<size_t>((self.storage_offset() + numel) * self.itemsize());
  if (needed > self.storage().nbytes()) {
    auto fresh = device_allocator.allocate(needed);
    std::memcpy(fresh.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(fresh));
    self.storage().unsafeGetStorageImpl()->set_nbytes(needed);
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
using SimulatedHooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, SimulatedHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &resize_);
  for (const char* name :
       {"convolution", "convolution_backward", "convolution_overrideable", "_native_batch_norm_legit"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

namespace {
// Lines "name=count".
const char* listed(const std::map<std::string, int64_t>& counts) {
  static thread_local std::string text;
  text.clear();
  for (const auto& one : counts) text += one.first + "=" + std::to_string(one.second) + "\n";
  return text.c_str();
}

struct Install {
  Install() { c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator, 255); }
} install;
std::vector<std::shared_ptr<Capture>> graphs;
}  // namespace

extern "C" {
int64_t sim_allocated() { return allocated; }
int64_t sim_peak() { return peak; }
void sim_reset_peak() { peak = allocated; }
void sim_limit(int64_t bytes) { limit = bytes; }
int64_t sim_stream(int64_t stream) {
  auto before = current_stream;
  current_stream = stream;
  return before;
}
int64_t sim_current_stream() { return current_stream; }
int64_t sim_ticket() { return tickets; }
void sim_run_until(int64_t stream, int64_t ticket) { run_until(stream, ticket); }
int64_t sim_queued(int64_t stream) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  return static_cast<int64_t>(queued[stream].size());
}
const char* sim_sync_names() { return listed(sync_names); }
void sim_sync_errors(int64_t on) { sync_errors = on; }
// 0, or why this may not wait: 1 a capture, 2 the debug mode.
int sim_wait(const char* what) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  if (in_capture()) return 1;
  if (sync_errors) return 2;
  ++sync_names[what];
  return 0;
}
const char* sim_launches() { return listed(launches); }
void sim_begin_capture(int64_t stream) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  capturing = std::make_shared<Capture>();
  capture_stream = stream;
}
int64_t sim_end_capture() {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  for (auto& one : capturing->restore) one.second();
  graphs.push_back(capturing);
  capturing.reset();
  capture_stream = -1;
  return static_cast<int64_t>(graphs.size()) - 1;
}
void sim_replay(int64_t graph) {
  std::lock_guard<std::recursive_mutex> guard(work_lock);
  run_until(current_stream, tickets);
  for (auto& one : graphs[graph]->work) one();
}
void sim_forget(int64_t graph) { graphs[graph].reset(); }
int64_t sim_is_capturing() { return in_capture(); }
void sim_seed(int64_t seed) { default_generator().set_current_seed(static_cast<uint64_t>(seed)); }
}
