//! One direction of a link: what becomes of each packet, and when. Pure: time is an argument.

use std::collections::VecDeque;

use super::Model;
use crate::random::Random;

/// Most bytes on the way at a time: what 10 Gbit/s put into 50 ms, the longest delay of the experiments.
const HELD_BYTES_MAX: usize = 64 << 20;
const NS_PER_S: u128 = 1_000_000_000;

/// What becomes of a packet that enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It leaves when it is due.
    Waits,
    /// It is lost on the way.
    Lost,
    /// There is no room for it.
    Dropped,
}

#[derive(Debug)]
struct Packet {
    due_ns: u64,
    bytes: Vec<u8>,
}

/// Packets on their way in one direction. They leave in the order in which they entered.
#[derive(Debug)]
pub struct Line {
    model: Model,
    random: Random,
    packets: VecDeque<Packet>,
    /// When the last packet that entered has been put on the wire.
    sent_ns: u64,
    spare: Vec<Vec<u8>>,
}

impl Line {
    /// An empty line whose losses follow from `seed`.
    #[must_use]
    pub fn new(model: Model, seed: u64) -> Self {
        Self { model, random: Random::new(seed), packets: VecDeque::new(), sent_ns: 0, spare: Vec::new() }
    }

    /// Room for a packet, as long as the longest one: for [`enter`](Self::enter) or [`give_back`](Self::give_back).
    pub fn buffer(&mut self) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.resize(self.model.mtu, 0);
        buffer
    }

    /// Takes the room of a packet back.
    pub fn give_back(&mut self, buffer: Vec<u8>) {
        self.spare.push(buffer);
    }

    /// A packet enters at `now_ns`, which never goes back.
    pub fn enter(&mut self, now_ns: u64, packet: Vec<u8>) -> Fate {
        let sent_ns = now_ns.max(self.sent_ns) + self.wire_ns(packet.len());
        let fate = if self.is_lost() {
            Fate::Lost
        } else if self.queued_ns(now_ns) > self.wire_ns(self.model.queue_bytes)
            || (self.packets.len() + 1) * self.model.mtu > HELD_BYTES_MAX
        {
            Fate::Dropped
        } else {
            Fate::Waits
        };
        match fate {
            Fate::Waits => {
                self.sent_ns = sent_ns;
                let delay = u64::try_from(self.model.delay.as_nanos()).unwrap_or(u64::MAX);
                self.packets.push_back(Packet { due_ns: sent_ns.saturating_add(delay), bytes: packet });
            }
            Fate::Lost | Fate::Dropped => self.give_back(packet),
        }
        fate
    }

    /// When the next packet leaves.
    #[must_use]
    pub fn next_due(&self) -> Option<u64> {
        self.packets.front().map(|packet| packet.due_ns)
    }

    /// The next packet, if it is due by `now_ns`.
    pub fn leave(&mut self, now_ns: u64) -> Option<Vec<u8>> {
        if self.next_due()? > now_ns {
            return None;
        }
        self.packets.pop_front().map(|packet| packet.bytes)
    }

    /// How long what waits for the wire will take to be sent.
    const fn queued_ns(&self, now_ns: u64) -> u64 {
        self.sent_ns.saturating_sub(now_ns)
    }

    /// How long the wire is busy with so many bytes.
    fn wire_ns(&self, bytes: usize) -> u64 {
        let Some(rate) = self.model.rate_bit else { return 0 };
        u64::try_from(bytes as u128 * 8 * NS_PER_S / u128::from(rate.max(1))).unwrap_or(u64::MAX)
    }

    fn is_lost(&mut self) -> bool {
        #[expect(clippy::cast_precision_loss, reason = "the upper 53 bits, which a float holds")]
        let drawn = (self.random.next() >> 11) as f64 / (1_u64 << 53) as f64;
        drawn < self.model.loss
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MS: u64 = 1_000_000;

    fn packet(line: &mut Line, len: usize, mark: u8) -> Vec<u8> {
        let mut packet = line.buffer();
        packet.truncate(len);
        packet[0] = mark;
        packet
    }

    fn lost(model: Model, seed: u64, packets: usize) -> Vec<usize> {
        let mut line = Line::new(model, seed);
        let mut enter = |_: &usize| {
            let packet = packet(&mut line, 100, 0);
            let fate = line.enter(0, packet);
            if let Some(packet) = line.leave(0) {
                line.give_back(packet);
            }
            fate == Fate::Lost
        };
        (0..packets).filter(|i| enter(i)).collect()
    }

    #[test]
    fn packets_leave_in_order_after_the_delay_and_not_before() {
        let mut line = Line::new(Model { delay: Duration::from_millis(5), ..Model::default() }, 1);
        assert_eq!((line.next_due(), line.leave(100 * MS)), (None, None));
        for (at, mark) in [(0, 1), (2, 2), (2, 3)] {
            let packet = packet(&mut line, 60, mark);
            assert_eq!(line.enter(at * MS, packet), Fate::Waits);
        }
        assert_eq!((line.next_due(), line.leave(5 * MS - 1)), (Some(5 * MS), None));
        assert_eq!(line.leave(5 * MS).unwrap()[0], 1);
        assert_eq!((line.next_due(), line.leave(6 * MS)), (Some(7 * MS), None));
        assert_eq!([line.leave(7 * MS).unwrap()[0], line.leave(9 * MS).unwrap()[0]], [2, 3]);
        assert_eq!(line.leave(u64::MAX), None);
    }

    #[test]
    fn a_share_of_the_packets_is_lost_and_the_same_ones_for_a_seed() {
        let model = Model { loss: 0.01, ..Model::default() };
        let first = lost(model, 7, 100_000);
        // Binomial: 1000 expected, standard deviation 31; five of them either way.
        assert!((843..=1157).contains(&first.len()), "{} lost", first.len());
        assert_eq!(first, lost(model, 7, 100_000));
        assert_ne!(first, lost(model, 8, 100_000));
        assert!(lost(Model::default(), 7, 10_000).is_empty());
        assert_eq!(lost(Model { loss: 1.0, ..model }, 7, 1000).len(), 1000);
        // Each by itself: about one in a hundred follows right behind another.
        let pairs = first.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
        assert!(pairs <= 30, "{pairs} pairs");
    }

    #[test]
    fn a_rate_spaces_packets_and_its_queue_is_bounded() {
        // 8 Mbit/s: a packet of 1000 bytes takes a millisecond.
        let model = Model { rate_bit: Some(8_000_000), queue_bytes: 4000, ..Model::default() };
        let mut line = Line::new(model, 1);
        let fates: Vec<Fate> = (0..8)
            .map(|mark| {
                let packet = packet(&mut line, 1000, mark);
                line.enter(0, packet)
            })
            .collect();
        // The one on the wire, four that wait, and no room for more.
        assert_eq!(fates, [[Fate::Waits; 5].as_slice(), &[Fate::Dropped; 3]].concat());
        assert_eq!((line.next_due(), line.leave(MS - 1)), (Some(MS), None));
        let left: Vec<u8> = (1..=5).map(|at| line.leave(at * MS).unwrap()[0]).collect();
        assert_eq!(left, [0, 1, 2, 3, 4]);
        // The wire has been idle since: the next one takes its own time only.
        let packet = packet(&mut line, 1000, 9);
        line.enter(100 * MS, packet);
        assert_eq!(line.next_due(), Some(101 * MS));
    }

    #[test]
    fn what_is_on_the_way_is_bounded() {
        let mut line = Line::new(Model { delay: Duration::from_secs(1), mtu: 9000, ..Model::default() }, 1);
        let mut taken = 0;
        loop {
            let packet = packet(&mut line, 9000, 0);
            if line.enter(0, packet) == Fate::Dropped {
                break;
            }
            taken += 1;
        }
        assert_eq!(taken, HELD_BYTES_MAX / 9000);
        assert_eq!(line.leave(1000 * MS).map(|packet| packet.len()), Some(9000));
    }
}
