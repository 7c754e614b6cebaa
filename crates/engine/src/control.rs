//! What an operator does to a run: pause, cancel, change settings, replay, rebuild, forget.

pub mod forget;
pub mod max_dead;
pub mod rebuild;
pub mod replay;
pub mod steer;
