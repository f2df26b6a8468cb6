//! The Python peers: their environment, and one process for each.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::compare::contest::Contestant;
use crate::compare::task::{Task, Tensor};
use crate::note;

const REQUIREMENTS: &str = "benches/peers/requirements.txt";
const WORKER: &str = "benches/peers/worker.py";
const VENV: &str = "target/peers-venv";

/// Names for `worker.py`, and titles.
const PEERS: [(&str, &str); 3] =
    [("torch", "PyTorch"), ("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")];

/// Where operands and results are handed over: files of raw little-endian `f32`.
pub struct Handover {
    dir: TempDir,
}

/// Files that vanish when this does.
pub struct Files(Vec<PathBuf>);

impl Drop for Files {
    fn drop(&mut self) {
        for file in &self.0 {
            let _ = fs::remove_file(file); // The directory goes at the end in any case.
        }
    }
}

impl Handover {
    pub fn new() -> Result<Handover> {
        Ok(Handover { dir: tempfile::tempdir().context("no temporary directory")? })
    }

    /// Writes the operands.
    pub fn write(&self, tensors: &[Tensor]) -> Result<Files> {
        let mut files = Files(vec![]);
        for tensor in tensors {
            let path = self.dir.path().join(&tensor.name);
            let bytes: Vec<u8> = tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect();
            fs::write(&path, bytes).with_context(|| path.display().to_string())?;
            files.0.push(path);
        }
        Ok(files)
    }

    fn result(&self) -> PathBuf {
        self.dir.path().join("result")
    }
}

/// The environment with what can be installed; says on standard error what it installs. The command runs in the root of the repository.
pub fn install() -> Result<PathBuf> {
    let requirements = fs::read_to_string(REQUIREMENTS)
        .with_context(|| format!("no {REQUIREMENTS}: run this in the root of the repository"))?;
    let python = Path::new(VENV).join("bin/python");
    let done = Path::new(VENV).join("installed.txt");
    if python.exists() && fs::read_to_string(&done).is_ok_and(|installed| installed == requirements) {
        return Ok(python);
    }
    note(format_args!("laneformer: making {VENV}"));
    let made = Command::new("python3").args(["-m", "venv", VENV]).status().context("cannot run python3")?;
    if !made.success() {
        bail!("python3 -m venv {VENV} failed");
    }
    let mut complete = true;
    // One by one: what cannot be installed must not keep the others away.
    for package in requirements.lines().filter(|line| !line.trim().is_empty()) {
        note(format_args!("laneformer: installing {package}"));
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", package];
        complete &= Command::new(&python).args(pip).status()?.success();
    }
    if complete {
        fs::write(done, requirements)?;
    }
    Ok(python)
}

/// All Python peers, each with `threads` threads.
pub fn start(python: &Path, threads: usize) -> Vec<Contestant<'static>> {
    let start = |(peer, name): (&str, &str)| match Worker::start(python, peer, name, threads) {
        Ok(worker) => Contestant::Worker(worker),
        Err(error) => Contestant::Absent { name: name.to_owned(), reason: format!("{error:#}") },
    };
    PEERS.into_iter().map(start).collect()
}

/// All Python peers as columns that say why they are empty.
pub fn absent(reason: &str) -> Vec<Contestant<'static>> {
    let absent =
        |(_, name): (&str, &str)| Contestant::Absent { name: name.to_owned(), reason: reason.to_owned() };
    PEERS.into_iter().map(absent).collect()
}

/// A process that lives for all tasks.
pub struct Worker {
    /// Title and version.
    pub name: String,
    process: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    fn start(python: &Path, peer: &str, name: &str, threads: usize) -> Result<Worker> {
        let mut process = Command::new(python)
            .args(["-B", WORKER, peer, &threads.to_string()])
            .env("OMP_NUM_THREADS", threads.to_string())
            // Those of the tokenizers.
            .env("RAYON_NUM_THREADS", threads.to_string())
            .env("TOKENIZERS_PARALLELISM", (threads > 1).to_string())
            // All models are here: nobody is to be asked for newer ones.
            .env("HF_HUB_OFFLINE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("not installed")?;
        let (Some(requests), Some(answers)) = (process.stdin.take(), process.stdout.take()) else {
            bail!("no pipes");
        };
        let requests = Some(requests);
        let mut worker =
            Worker { name: name.to_owned(), process, requests, answers: BufReader::new(answers) };
        let hello = worker.answer()?;
        let version = hello["version"].as_str().context("no version")?;
        worker.name = format!("{name} {}", version.split('+').next().unwrap_or(version));
        Ok(worker)
    }

    pub fn setup(&mut self, task: &Task, tensors: &[Tensor], handover: &Handover) -> Result<()> {
        let mut request = serde_json::to_value(&task.spec)?;
        request["cmd"] = json!("setup");
        request["dir"] = json!(handover.dir.path());
        request["tensors"] = tensors.iter().map(|t| (t.name.clone(), json!(t.shape))).collect();
        self.ask(&request)?;
        Ok(())
    }

    /// Nanoseconds of each run, perhaps after one that warms the caches.
    pub fn round(&mut self, runs: usize, warm: bool) -> Result<Vec<f64>> {
        let answer = self.ask(&json!({ "cmd": "round", "runs": runs, "warm": warm }))?;
        Ok(serde_json::from_value(answer["ns"].clone())?)
    }

    pub fn result(&mut self, handover: &Handover) -> Result<Vec<f32>> {
        let path = handover.result();
        self.ask(&json!({ "cmd": "result", "path": path }))?;
        let bytes = fs::read(path)?;
        Ok(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        let requests = self.requests.as_mut().context("closed")?;
        writeln!(requests, "{request}").and_then(|()| requests.flush()).context("its process ended")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("its process ended");
        }
        let answer: Value = serde_json::from_str(&line)?;
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }
}

impl Drop for Worker {
    /// The end of its input ends the process.
    fn drop(&mut self) {
        self.requests = None;
        let _ = self.process.wait(); // It was told to go; how it went changes nothing.
    }
}
