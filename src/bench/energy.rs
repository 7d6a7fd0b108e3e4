//! What the GPUs have drawn, by NVML where there is one: a counter of millijoules that is read while a run goes on.

use crate::gpu::libraries::{Wanted, symbol};
use crate::{Error, Result};
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const NVML: Wanted = Wanted {
    what: "NVML",
    stem: "libnvidia-ml",
    majors: &[1],
    hint: "it comes with the NVIDIA driver; without it no energy is shown",
};

/// Time between two readings; the counters move every 20 to 100 ms.
const PERIOD: Duration = Duration::from_millis(20);

/// A device of NVML.
type Handle = *mut c_void;

/// The energy counters of some GPUs of this machine.
pub struct Meter {
    energy: unsafe extern "C" fn(Handle, *mut u64) -> c_int,
    devices: Vec<usize>,
}

/// Joules of all GPUs together, as read at some moments.
#[derive(Debug, Clone, Default)]
pub struct Readings(Vec<(Instant, f64)>);

impl Meter {
    /// The counters of the GPUs with these UUIDs (32 hexadecimal digits).
    ///
    /// # Errors
    /// No NVML, no such GPU here, or one that does not count.
    pub fn open(uuids: &[String]) -> Result<Meter> {
        let library = NVML.open()?;
        // SAFETY: the types are those of nvml.h.
        let (init, by_uuid, energy) = unsafe {
            type ByUuid = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
            (
                symbol::<unsafe extern "C" fn() -> c_int>(library, NVML.what, "nvmlInit_v2")?,
                symbol::<ByUuid>(library, NVML.what, "nvmlDeviceGetHandleByUUID")?,
                symbol::<unsafe extern "C" fn(Handle, *mut u64) -> c_int>(
                    library,
                    NVML.what,
                    "nvmlDeviceGetTotalEnergyConsumption",
                )?,
            )
        };
        // SAFETY: takes nothing; may be called again and again.
        check("nvmlInit_v2", unsafe { init() })?;
        let mut devices = Vec::new();
        for uuid in uuids {
            let name =
                CString::new(dashed(uuid)).map_err(|_| Error::failed("a UUID with a NUL"))?;
            let mut handle = std::ptr::null_mut();
            // SAFETY: a string with its end, and an out-parameter.
            check("nvmlDeviceGetHandleByUUID", unsafe {
                by_uuid(name.as_ptr(), &mut handle)
            })?;
            devices.push(handle as usize);
        }
        let meter = Meter { energy, devices };
        meter.joules().map(|_| meter)
    }

    /// What the GPUs have drawn since the driver was loaded.
    ///
    /// # Errors
    /// Those of NVML.
    fn joules(&self) -> Result<f64> {
        let mut sum = 0.0;
        for &device in &self.devices {
            let mut millijoules = 0;
            // SAFETY: a handle that NVML gave, which stays valid, and an out-parameter.
            let code = unsafe { (self.energy)(device as Handle, &mut millijoules) };
            check("nvmlDeviceGetTotalEnergyConsumption", code)?;
            sum += millijoules as f64 / 1e3;
        }
        Ok(sum)
    }

    /// Reads the counters for as long as `work` goes on.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> (T, Readings) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readings = scope.spawn(|| {
                let mut readings = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    if let Ok(joules) = self.joules() {
                        readings.push((Instant::now(), joules));
                    }
                    std::thread::sleep(PERIOD);
                }
                Readings(readings)
            });
            let outcome = work();
            done.store(true, Ordering::Relaxed);
            (outcome, readings.join().unwrap_or_default())
        })
    }
}

impl Readings {
    /// Joules drawn from `from` to `to`, by straight lines between readings; `None` where they do not reach that far.
    pub fn between(&self, from: Instant, to: Instant) -> Option<f64> {
        Some(self.at(to)? - self.at(from)?)
    }

    fn at(&self, when: Instant) -> Option<f64> {
        let after = self.0.iter().position(|(t, _)| *t >= when)?;
        let (t1, j1) = self.0[after];
        let Some(before) = after.checked_sub(1) else {
            return (t1 == when).then_some(j1);
        };
        let (t0, j0) = self.0[before];
        let share = (when - t0).as_secs_f64() / (t1 - t0).as_secs_f64();
        Some(j0 + share * (j1 - j0))
    }
}

fn check(call: &str, code: c_int) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(Error::failed(format!("{call}: NVML error {code}"))),
    }
}

/// `GPU-8-4-4-4-12`, as NVML writes a UUID.
fn dashed(hex: &str) -> String {
    let ends = [8, 12, 16, 20];
    let mut name = String::from("GPU-");
    for (i, c) in hex.chars().enumerate() {
        if ends.contains(&i) {
            name.push('-');
        }
        name.push(c);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_nvml_does() {
        assert_eq!(
            dashed("0123456789abcdef0123456789abcdef"),
            "GPU-01234567-89ab-cdef-0123-456789abcdef"
        );
    }

    #[test]
    fn energy_between_two_moments_is_interpolated() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let readings = Readings(vec![(at(0), 100.0), (at(100), 110.0), (at(200), 150.0)]);
        let joules = readings.between(at(50), at(150)).unwrap();
        assert!((joules - 25.0).abs() < 1e-9, "{joules}");
        assert_eq!(readings.between(at(0), at(201)), None);
        assert_eq!(Readings::default().between(at(0), at(1)), None);
    }

    #[test]
    fn without_nvml_there_is_one_clear_line() {
        if let Err(e) = Meter::open(&["0".repeat(32)]) {
            let e = e.to_string();
            assert!(e.contains("NVML"), "{e}");
        }
    }
}
