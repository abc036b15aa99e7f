//! QEMU's control protocol: a line of JSON each way, with events in between.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at what is waited for.
const INTERVAL: Duration = Duration::from_millis(1);

/// The control connection of one machine.
#[derive(Debug)]
pub(super) struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a machine that was just started.
    pub(super) fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connecting to {path:?}"))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Self { lines: BufReader::new(stream) };
        let greeting = qmp.read()?;
        ensure!(greeting.get("QMP").is_some(), "no greeting: {greeting}");
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; what it returns.
    pub(super) fn ask(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.lines.get_mut().write_all(text.as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {}", error.get("desc").and_then(Value::as_str).unwrap_or("failed"));
            }
            // An event: what it says can be asked for.
        }
    }

    /// Switches capabilities of a migration on.
    pub(super) fn enable(&mut self, capabilities: &[&str]) -> anyhow::Result<()> {
        let all: Vec<Value> =
            capabilities.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        self.ask("migrate-set-capabilities", json!({ "capabilities": all })).map(drop)
    }

    /// Asks again and again until the answer has `status` as its status; that answer.
    pub(super) fn wait_status(
        &mut self,
        command: &str,
        status: &str,
        limit: Duration,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.ask(command, json!({}))?;
            let now = answer.get("status").and_then(Value::as_str).unwrap_or_default();
            if now == status {
                return Ok(answer);
            }
            ensure!(now != "failed" && now != "postcopy-paused", "{command}: {answer}");
            ensure!(Instant::now() < deadline, "{command} is {now:?} and not {status:?} after {limit:?}");
            std::thread::sleep(INTERVAL);
        }
    }

    fn read(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line).context("reading QEMU's answer")?;
        ensure!(!line.is_empty(), "QEMU closed its control connection");
        serde_json::from_str(&line).with_context(|| format!("understanding {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found_between_events_and_errors_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let machine = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut say = |text: &str| stream.write_all(format!("{text}\n").as_bytes()).unwrap();
            say(r#"{"QMP": {"version": {}}}"#);
            for answer in [
                r#"{"return": {}}"#,
                r#"{"event": "RESUME"}"#,
                r#"{"return": {"status": "active"}}"#,
                r#"{"return": {"status": "completed", "n": 7}}"#,
                r#"{"error": {"class": "GenericError", "desc": "no such thing"}}"#,
            ] {
                if !answer.contains("return\": {\"status\": \"active") {
                    let line = asked.next().unwrap().unwrap();
                    assert!(line.contains("\"execute\""), "{line}");
                }
                say(answer);
            }
        });
        let mut qmp = Qmp::connect(&path).unwrap();
        let done = qmp.wait_status("query-migrate", "completed", ANSWER_LIMIT).unwrap();
        assert_eq!(done.get("n").and_then(Value::as_u64), Some(7));
        let error = qmp.ask("dance", json!({})).unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");
        machine.join().unwrap();
    }
}
