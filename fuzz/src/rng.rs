//! The entropy device: nothing of its own.

use firn_vmm::{devices::rng::Rng, virtio::DeviceError};

use crate::script::{Driver, Subject};

impl Subject for Rng {
    type Extra = ();
    type Host = ();

    fn extra(_: &mut Driver<Self>, _: &mut (), (): ()) -> Result<(), DeviceError> {
        Ok(())
    }

    fn thaw(driver: &mut Driver<Self>, _: &mut ()) {
        let state = driver.save();
        assert!(driver.restore(&state));
        assert_eq!(driver.save(), state);
    }
}
