//! What a run holds in its phases.

use std::cell::RefCell;
use std::rc::Rc;

use burn::tensor::Device;
use burn_nf4::op::MemoryWatch;
use burn_nf4_llm::train::PhaseHook;

use crate::progress::{mebibytes, memory_bytes, peak_memory_bytes, restart_peak};

/// Bytes by phase: those of the device that its allocator knows, else those of the process.
///
/// Of a device they are looked at after each layer, and by a [`MemoryWatch`] in between, where most is in use: the
/// allocator keeps no peak.
#[derive(Clone)]
pub struct MemoryReport {
    device: Device,
    watch: Rc<Option<MemoryWatch>>,
    phases: Rc<RefCell<Vec<PhaseBytes>>>,
    /// Whether the peak of the process can be had of each phase alone.
    restarts: bool,
}

struct PhaseBytes {
    name: &'static str,
    /// When it was last asked for.
    live: Option<u64>,
    most: Option<u64>,
    reserved: Option<u64>,
}

impl MemoryReport {
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            watch: Rc::new(MemoryWatch::new(device)),
            phases: Rc::default(),
            restarts: restart_peak(),
        }
    }

    /// Asks what is held now, in a phase. Waits for the device.
    pub fn ask(&self, name: &'static str) {
        // A device that fails will say so where its results are needed.
        let _ = self.device.sync();
        let usage = self.device.memory_pool_usage();
        let (live, most) = match usage {
            Some(usage) => {
                let watch = self.watch.as_ref().as_ref();
                let between = watch.map_or(0, MemoryWatch::take_most_bytes);
                let live = usage.bytes_in_use;
                (Some(live), Some(live.max(between)))
            }
            None => (memory_bytes(), peak_memory_bytes()),
        };
        if self.restarts {
            restart_peak();
        }
        let reserved = usage.map(|usage| usage.bytes_reserved);
        let mut phases = self.phases.borrow_mut();
        match phases.iter_mut().find(|phase| phase.name == name) {
            Some(phase) => {
                phase.live = live;
                phase.most = phase.most.max(most);
                phase.reserved = phase.reserved.max(reserved);
            }
            None => phases.push(PhaseBytes {
                name,
                live,
                most,
                reserved,
            }),
        }
    }

    /// Asks in the phases of steps.
    pub fn hook(&self) -> PhaseHook {
        let report = self.clone();
        Box::new(move |phase| report.ask(phase.name()))
    }

    /// The most that was held: the peak of a process, of a device the largest of the samples.
    pub fn most(&self) -> Option<u64> {
        self.phases
            .borrow()
            .iter()
            .filter_map(|phase| phase.most)
            .max()
    }

    /// A table.
    pub fn lines(&self) -> String {
        let of_device = self.device.memory_pool_usage().is_some();
        let heads = match (of_device, self.restarts) {
            (true, _) => "in use at its end, peak of samples, most reserved",
            (false, true) => "of the process at its end, peak",
            (false, false) => "of the process at its end, peak so far",
        };
        let mut lines = format!("memory by phase ({heads}):");
        for phase in self.phases.borrow().iter() {
            let numbers = [phase.live, phase.most, phase.reserved];
            lines += &format!("\n  {:<10}", phase.name);
            for bytes in numbers.into_iter().flatten() {
                lines += &format!("  {:>12}", mebibytes(bytes));
            }
        }
        lines
    }
}
