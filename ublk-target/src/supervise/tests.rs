//! What the supervisor makes of what its worker says, and of its end.

use super::*;
use clap::Parser;

/// A supervisor with a worker of which the test holds the other end.
fn hearing(test: impl FnOnce(&mut Supervisor<'_>, UnixStream)) {
    let cli = crate::cli::Cli::parse_from(["ghostswap-ublk", "add", "--size", "1G"]);
    let crate::cli::Command::Add(add) = cli.command else { panic!("not add") };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let arena = std::fs::File::open("/dev/null").unwrap().into();
    let shared = Arc::new(Shared::new().unwrap());
    test(&mut Supervisor::new(&add, arena, shared, None, Worker::new(0, ours)), theirs);
}

#[test]
fn what_comes_in_one_piece_is_heard_at_once() {
    hearing(|supervisor, mut worker| {
        worker.write_all(b"ready\nlive 3 true /dev/ublkb3\n").unwrap();
        supervisor.hear().unwrap();
        assert_eq!(supervisor.device, Some((3, "/dev/ublkb3".into())));
        assert!(supervisor.recoverable);
    });
}

#[test]
fn half_a_line_of_a_dead_worker_is_nothing() {
    hearing(|supervisor, mut worker| {
        worker.write_all(b"live 3 true /dev/ublkb3\nlive 3 fal").unwrap();
        drop(worker);
        supervisor.hear().unwrap();
        supervisor.hear_last_words().unwrap();
        assert!(supervisor.recoverable);
        assert_eq!(supervisor.device, Some((3, "/dev/ublkb3".into())));
    });
}

#[test]
fn a_device_that_was_to_go_and_went_is_no_loss() {
    hearing(|supervisor, mut worker| {
        // A number that no device has.
        worker.write_all(b"live 4000000 true /dev/ublkb4000000\n").unwrap();
        supervisor.hear().unwrap();
        drop(worker);
        let killed = Some(libc::SIGKILL);
        assert!(supervisor.worker_ended(killed).is_err(), "the device is gone, and nobody asked for it");
        supervisor.shared.board.stopping.store(1, Ordering::Relaxed);
        assert!(supervisor.worker_ended(killed).unwrap());
        assert!(supervisor.worker_ended(None).unwrap(), "likewise of a worker that is another's child");
    });
}
