//! The door to CubeCL's own stream of CUDA, on which a library of NVIDIA enqueues its work.
//!
//! # Why this is sound
//!
//! CubeCL has no interface for work of others, so this rests on how its server works (`cubecl-cuda`,
//! `cubecl-server`, `cubecl-runtime` 0.11.3, pinned in `Cargo.toml`):
//!
//! - **Order.** A device's server belongs to one thread, which runs the tasks of each caller in the order
//!   in which they were submitted; a launch of a kernel is such a task, and so is ours. Both enqueue on
//!   the stream that `MultiStream::resolve` gives for the caller's [`StreamId`], so it runs after
//!   the kernels launched before it, and before those launched after it.
//! - **Other streams.** `resolve` is told all buffers, as by a launch: it makes the stream wait for the
//!   writes of other streams, and keeps their memory from being reused before ours is done. What it
//!   returns is kept until the call is enqueued, because dropping it records that fence.
//! - **Lifetime.** The task owns a binding of every buffer. After the call is enqueued they are dropped,
//!   and their memory may be handed out again, to be written by work that is enqueued on the same
//!   stream, and so later.
//! - **Graphs.** While the stream records, each page that is used is made known to the recording
//!   (`StreamCapture::touch`), as `Command::resource` does for a launch: the graph then guards it as
//!   long as it lives.
//! - **Failures.** The task runs in an [`ExecuteScope`]: if an operand was never written the call is
//!   skipped, and an error is that of the result's buffer, for whoever reads it. No task panics.

use std::ffi::c_void;

use cubecl::prelude::Client;
use cubecl::server::{BufferBinding, Server, ServerError, ServerStorage};
use cubecl_common::device::DeviceId;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_cuda::CudaRuntime;
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::stream::StreamId;
use cubecl_runtime::runtime::Runtime;
use cubecl_server::id::KernelId;
use cubecl_server::stream::{ExecuteScope, WriteScoped};

type CudaServer = <CudaRuntime as Runtime>::Server;

/// What errors of skipped calls name in the place of a kernel.
struct ForeignKernel;

/// Whether a client's server is that of CUDA.
pub(super) fn is_cuda(client: &Client) -> bool {
    client.service_id().service == std::any::TypeId::of::<CudaServer>()
}

/// The way to the server of a CUDA device, on whose thread it runs.
pub(super) struct Door(DeviceHandle<CudaServer>);

impl Door {
    pub fn new(device: DeviceId) -> Self {
        Self(DeviceHandle::new(device))
    }

    /// Runs a function with the device's context current, and waits for it. The function is told
    /// whether a graph is being captured on the device.
    ///
    /// # Errors
    /// If the server cannot run it.
    pub fn with_context<R: Send>(
        &self,
        function: impl FnOnce(bool) -> R + Send,
    ) -> Result<R, String> {
        let stream = StreamId::current();
        let task = move |server: &mut CudaServer| {
            // Flushing makes the context current, as every command does.
            server.flush(stream).map_err(|error| error.to_string())?;
            let streams = server.write_streams();
            let any = streams.stream_ids().next();
            let any = any.and_then(|stream| streams.try_stream_mut(&stream));
            Ok(function(any.is_some_and(|stream| {
                stream.capturing.device().any_recording()
            })))
        };
        let done = self.0.submit_blocking(task);
        done.unwrap_or_else(|error| Err(format!("{error:?}")))
    }
}

/// The buffers that are used on the stream.
pub(super) struct Buffers {
    pub read: Vec<BufferBinding>,
    pub written: Vec<BufferBinding>,
}

/// Where the buffers lie on the device, in their order, and the stream.
pub(super) struct Resolved {
    pub read: Vec<u64>,
    pub written: Vec<u64>,
    pub stream: *mut c_void,
}

impl Door {
    /// Submits work to be enqueued on the stream of the calling thread, behind what that has launched
    /// before. Does not wait for it. What `enqueue` says goes to whoever reads what is written.
    ///
    /// # Safety
    /// The buffers belong to the device of the door. `enqueue`, called with the device's context current,
    /// puts work on the stream and on no other, which reads and writes these buffers within their sizes
    /// and nothing else.
    pub unsafe fn submit(
        &self,
        buffers: Buffers,
        enqueue: impl FnOnce(Resolved) -> Result<(), String> + Send + 'static,
    ) {
        // As for a launch: a dry run compiles kernels and runs none.
        if cubecl::dry_run::launch_mode().is_skipped() {
            return;
        }
        let stream = StreamId::current();
        self.0.clone().submit(move |server| {
            let mut written = server.write_set();
            written.extend(buffers.written.iter().cloned());
            let kernel = KernelId::new::<ForeignKernel>();
            let read = buffers.read.iter();
            ExecuteScope::launching(server, kernel, stream, read, written)
                .execute(|server| run(server, &buffers, stream, enqueue));
        });
    }
}

fn run(
    server: &mut CudaServer,
    buffers: &Buffers,
    stream: StreamId,
    enqueue: impl FnOnce(Resolved) -> Result<(), String>,
) -> Result<(), ServerError> {
    let all = || buffers.read.iter().chain(&buffers.written);
    // The one public call that makes the context current without other effects; the resource itself is
    // found again below.
    if let Some(any) = all().next() {
        drop(server.get_resource(any.clone(), stream)?);
    }
    let mut streams = server.write_streams().resolve(stream, all())?;
    let failed = |reason: String| ServerError::Generic {
        reason,
        backtrace: BackTrace::capture(),
    };
    let mut pointer = |binding: &BufferBinding| -> Result<u64, ServerError> {
        let location = binding.memory.descriptor().location();
        let current = streams.current();
        current.capturing.touch(binding.stream, location);
        let memory = &mut streams.get(&binding.stream).memory_management_gpu;
        let (claimed, binding) = (binding.size, binding.clone());
        let whole = memory.get_resource(binding.memory.clone(), None, None)?;
        if whole.size < claimed {
            return Err(failed(format!(
                "a buffer of {} bytes that claims to have {claimed}",
                whole.size
            )));
        }
        let resource =
            memory.get_resource(binding.memory, binding.offset_start, binding.offset_end)?;
        Ok(resource.ptr)
    };
    let mut pointers = |bindings: &[BufferBinding]| -> Result<Vec<u64>, ServerError> {
        bindings.iter().map(&mut pointer).collect()
    };
    let (read, written) = (pointers(&buffers.read)?, pointers(&buffers.written)?);
    let enqueued = enqueue(Resolved {
        read,
        written,
        stream: streams.current().sys as *mut c_void,
    });
    drop(streams);
    enqueued.map_err(failed)
}
