//! Messages for the log of the VMM: to `tracing`, to `log`, to both or to neither, depending on the features.

use std::error::Error;
use std::fmt::{self, Arguments};

/// An error with its causes.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

macro_rules! levels {
    ($($level:ident),*) => {$(
        pub(crate) fn $level(message: Arguments<'_>) {
            #[cfg(feature = "tracing")]
            tracing::$level!("{message}");
            #[cfg(feature = "log")]
            log::$level!("{message}");
            let _ = message;
        }
    )*};
}

levels!(error, warn, info, debug);
