//! A driver that writes whatever it likes.
