//! RESP, the protocol of redis, as far as a load client needs it.

use std::io::{BufRead, Read, Write};

use anyhow::{Context, bail};

/// Longest value that is accepted.
const BULK_BYTES_MAX: usize = 64 << 20;
/// Longest line that is accepted: a status, an error or a length.
const LINE_BYTES_MAX: u64 = 4096;

/// A reply. An error reply is an `Err` of [`read_reply`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// `+OK`
    Status(String),
    /// `:5`
    Integer(i64),
    /// `$3 foo`
    Bulk(Vec<u8>),
    /// `$-1`: no such key.
    Nil,
}

/// Writes a command.
pub(super) fn write_command(to: &mut impl Write, words: &[&[u8]]) -> std::io::Result<()> {
    write!(to, "*{}\r\n", words.len())?;
    for word in words {
        write!(to, "${}\r\n", word.len())?;
        to.write_all(word)?;
        to.write_all(b"\r\n")?;
    }
    Ok(())
}

/// Reads a reply.
pub(super) fn read_reply(from: &mut impl BufRead) -> anyhow::Result<Reply> {
    let line = read_line(from)?;
    let (kind, rest) = line.split_at_checked(1).context("empty reply")?;
    match kind {
        "+" => Ok(Reply::Status(rest.to_owned())),
        ":" => Ok(Reply::Integer(rest.parse().context("integer reply")?)),
        "$" if rest == "-1" => Ok(Reply::Nil),
        "$" => {
            let length: usize = rest.parse().context("length of a value")?;
            if length > BULK_BYTES_MAX {
                bail!("value of {length} bytes");
            }
            let mut value = vec![0; length + 2];
            from.read_exact(&mut value).context("reading a value")?;
            if !value.ends_with(b"\r\n") {
                bail!("value without its end");
            }
            value.truncate(length);
            Ok(Reply::Bulk(value))
        }
        "-" => bail!("error reply: {rest}"),
        _ => bail!("reply {line:?} is not understood"),
    }
}

fn read_line(from: &mut impl BufRead) -> anyhow::Result<String> {
    let mut line = Vec::new();
    from.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).context("reading a reply")?;
    if line.is_empty() {
        bail!("the server closed the connection");
    }
    let line = line.strip_suffix(b"\r\n").context("line without its end")?;
    Ok(String::from_utf8_lossy(line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_an_array_of_values() {
        let mut bytes = Vec::new();
        write_command(&mut bytes, &[b"SET", b"k", b"a\r\nb"]).unwrap();
        assert_eq!(bytes, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\na\r\nb\r\n");
    }

    #[test]
    fn replies_are_read_one_after_the_other() {
        let mut bytes = &b"+OK\r\n$4\r\na\r\nb\r\n:-3\r\n$-1\r\n$0\r\n\r\n"[..];
        let replies: Vec<Reply> = (0..5).map(|_| read_reply(&mut bytes).unwrap()).collect();
        let bulk = |value: &[u8]| Reply::Bulk(value.to_vec());
        assert_eq!(
            replies,
            [Reply::Status("OK".into()), bulk(b"a\r\nb"), Reply::Integer(-3), Reply::Nil, bulk(b"")]
        );
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for bytes in [
            &b""[..],
            b"\r\n",
            b"-ERR no\r\n",
            b"$9999999999\r\n",
            b"$3\r\nabcd\r\n",
            b"$3\r\nab",
            b"+OK",
            b"!x\r\n",
        ] {
            assert!(read_reply(&mut &*bytes).is_err(), "{bytes:?}");
        }
    }
}
