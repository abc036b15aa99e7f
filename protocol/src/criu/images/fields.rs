//! A walk over the fields of a protobuf message without decoding them.
//!
//! Two questions have to be answered before a message is decoded: how many elements a repeated field has (a
//! two-byte element decodes into a hundred-byte struct, so the record's length does not bound the memory), and
//! which fields there are that the decoder would skip without a word.

use super::error::DecodeError;

/// Calls `visit` with the number of each field of `record`, in order, repeated ones each time.
///
/// # Errors
/// [`DecodeError::Malformed`] if the fields do not fill the record exactly.
pub(super) fn visit(
    message: &'static str,
    record: &[u8],
    mut visit: impl FnMut(u64),
) -> Result<(), DecodeError> {
    let mut rest = record;
    while !rest.is_empty() {
        let number = field(&mut rest).ok_or(DecodeError::Malformed { message })?;
        visit(number);
    }
    Ok(())
}

/// Takes one field off `rest` and gives its number.
fn field(rest: &mut &[u8]) -> Option<u64> {
    let key = varint(rest)?;
    let skip = match key & 7 {
        0 => {
            varint(rest)?;
            0
        }
        1 => 8,
        2 => usize::try_from(varint(rest)?).ok()?,
        5 => 4,
        // Groups (3, 4) are not used by CRIU; 6 and 7 do not exist.
        _ => return None,
    };
    *rest = rest.split_at_checked(skip)?.1;
    Some(key >> 3)
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(record: &[u8]) -> Option<Vec<u64>> {
        let mut numbers = Vec::new();
        visit("test", record, |number| numbers.push(number)).ok()?;
        Some(numbers)
    }

    #[test]
    fn all_wire_types_are_walked() {
        let mut record = vec![0x08, 0xac, 0x02]; // field 1, varint 300
        record.extend([0x11, 1, 2, 3, 4, 5, 6, 7, 8]); // field 2, 64 bits
        record.extend([0x1a, 2, 0xff, 0xff]); // field 3, two bytes
        record.extend([0x25, 1, 2, 3, 4]); // field 4, 32 bits
        record.extend([0xf2, 0x01, 0]); // field 30, no bytes
        assert_eq!(numbers(&record).unwrap(), [1, 2, 3, 4, 30]);
        assert_eq!(numbers(&[]).unwrap(), []);
    }

    #[test]
    fn a_field_cut_short_is_refused() {
        for record in [&[0x08][..], &[0x08, 0x80], &[0x11, 0], &[0x1a, 2, 0], &[0x25, 0, 0, 0], &[0x80]] {
            assert_eq!(numbers(record), None, "{record:x?}");
        }
    }

    #[test]
    fn groups_and_endless_varints_are_refused() {
        assert_eq!(numbers(&[0x0b]), None);
        assert_eq!(numbers(&[0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]), None);
    }

    #[test]
    fn a_length_past_the_address_space_is_refused() {
        assert_eq!(numbers(&[0x1a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]), None);
    }
}
