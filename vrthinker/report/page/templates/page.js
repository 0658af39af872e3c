"use strict";
// Clicking a frame shows it in its clip: paused, in the middle of the frame's own time.
// One clock moves both clips: each shows the frame that has begun at the clock's time.
(() => {
  const clips = new Map();

  for (const given of JSON.parse(document.getElementById("clip-data").textContent)) {
    const section = document.getElementById(`clip-${given.video}`);
    const player = section.querySelector("video");
    if (player) {
      const part = (name) => section.querySelector(name);
      clips.set(given.video, {
        ...given,
        section,
        player,
        status: part("output"),
        play: part(".play"),
        back: part(".back"),
        timeline: part(".timeline"),
        head: part(".head"),
        index: 0,
        from: null,
      });
    }
  }

  const last = (clip) => clip.times.length - 2;

  const middle = (clip, index) => (clip.times[index] + clip.times[index + 1]) / 2;

  // The frame that is on the screen at a time: the last one that has begun.
  function indexAt(clip, seconds) {
    let low = 0;
    let high = last(clip);
    while (low < high) {
      const half = Math.ceil((low + high) / 2);
      if (clip.times[half] <= seconds) low = half;
      else high = half - 1;
    }
    return low;
  }

  function tell(clip, index) {
    clip.index = index;
    const number = clip.numbers ? clip.numbers[index] : clip.first + index;
    const name = number === undefined ? "no numbered frame" : `frame ${number}`;
    clip.status.textContent = `${name} · ${clip.times[index].toFixed(3)} s`;
    const width = clip.times.length / 200;
    clip.head.setAttribute("width", width);
    clip.head.setAttribute("x", index + 0.5 - width / 2);
    for (const frame of document.querySelectorAll(`.frame[data-video="${clip.video}"]`)) {
      if (Number(frame.dataset.index) === index) frame.setAttribute("aria-current", "true");
      else frame.removeAttribute("aria-current");
    }
  }

  function show(clip, index) {
    const wanted = Math.min(Math.max(index, 0), last(clip));
    clock = clip.times[wanted];
    clip.player.pause();
    clip.player.currentTime = middle(clip, wanted);
    tell(clip, wanted);
    tellClock();
  }

  // The clock of both clips, in seconds. It always stands where a frame of one of them begins.
  let clock = 0;
  let tellClock = () => {};

  function bringIntoView(clip, from) {
    const box = clip.player.getBoundingClientRect();
    if (box.top >= 0 && box.bottom <= window.innerHeight) return;
    clip.section.scrollIntoView({ block: "start" });
    clip.from = from;
    clip.back.hidden = false;
  }

  for (const button of document.querySelectorAll("button[data-index]")) {
    button.addEventListener("click", () => {
      const clip = clips.get(Number(button.dataset.video));
      show(clip, Number(button.dataset.index));
      bringIntoView(clip, button);
    });
  }

  function setUp(clip) {
    const { section, player, timeline } = clip;
    // The browser's own controls lie over the picture.
    player.controls = false;
    section.querySelector(".controls").hidden = false;
    for (const button of section.querySelectorAll("button[data-step]")) {
      button.addEventListener("click", () => show(clip, clip.index + Number(button.dataset.step)));
    }
    const toggle = () => (player.paused ? player.play() : player.pause());
    clip.play.addEventListener("click", toggle);
    player.addEventListener("click", toggle);
    for (const happened of ["play", "pause"]) {
      player.addEventListener(happened, () => {
        clip.play.textContent = player.paused ? "Play" : "Pause";
        clip.status.setAttribute("aria-live", player.paused ? "polite" : "off");
      });
    }
    const speed = section.querySelector("select");
    speed.addEventListener("change", () => {
      player.playbackRate = Number(speed.value);
    });
    const full = section.querySelector(".full");
    full.hidden = !player.requestFullscreen;
    full.addEventListener("click", () => player.requestFullscreen());
    clip.back.addEventListener("click", () => {
      clip.back.hidden = true;
      clip.from.scrollIntoView({ block: "center" });
      clip.from.focus({ preventScroll: true });
    });
    for (const happened of ["pointerdown", "pointermove"]) {
      timeline.addEventListener(happened, (event) => {
        if (!(event.buttons & 1)) return;
        const box = timeline.getBoundingClientRect();
        show(clip, Math.floor(((event.clientX - box.left) / box.width) * (last(clip) + 1)));
      });
    }
    // While it plays. A frame's time is exact to a microsecond, hence the allowance.
    if (player.requestVideoFrameCallback) {
      const follow = (_, frame) => {
        if (!player.paused) tell(clip, indexAt(clip, frame.mediaTime + 1e-4));
        player.requestVideoFrameCallback(follow);
      };
      player.requestVideoFrameCallback(follow);
    } else {
      player.addEventListener("timeupdate", () => tell(clip, indexAt(clip, player.currentTime)));
    }
    // Whatever stopped it (the end, the browser's menu), what is told is what is seen.
    player.addEventListener("pause", () => tell(clip, indexAt(clip, player.currentTime)));
    clip.status.textContent = "click a frame to see it here";
  }

  function setUpBoth(pair) {
    const bar = document.querySelector(".both");
    const toggle = bar.querySelector(".play");
    const range = bar.querySelector(".clock");
    const told = bar.querySelector("output");
    const speed = bar.querySelector("select");
    const ALMOST = 1e-6;
    const end = Math.max(...pair.map((clip) => clip.times[last(clip)]));
    const longest = pair.reduce((a, b) => (a.times.at(-1) >= b.times.at(-1) ? a : b));
    let playing = false;
    let turn = 0; // a start that was overtaken while it waited does nothing

    tellClock = () => {
      told.textContent = `${clock.toFixed(3)} s`;
      range.value = end ? (1000 * clock) / end : 0;
    };

    function showBoth(seconds) {
      stop();
      for (const clip of pair) show(clip, indexAt(clip, seconds + ALMOST));
      clock = seconds;
      tellClock();
    }

    // To where the next frame of either clip begins, or the one before.
    function step(by) {
      const begins = pair.map((clip) => {
        const index = by > 0 ? indexAt(clip, clock + ALMOST) + 1 : indexAt(clip, clock - ALMOST);
        return index > last(clip) ? clock : clip.times[index];
      });
      const ahead = begins.filter((time) => (by > 0 ? time > clock + ALMOST : time < clock - ALMOST));
      if (ahead.length) showBoth(by > 0 ? Math.min(...ahead) : Math.max(...ahead));
    }

    function stop() {
      turn += 1;
      playing = false;
      toggle.textContent = "Play both";
      for (const clip of pair) clip.player.pause();
    }

    function follow() {
      if (!playing) return;
      const now = longest.player.currentTime;
      for (const clip of pair) {
        const { player } = clip;
        if (clip !== longest && !player.paused && Math.abs(player.currentTime - now) > 0.08) {
          player.currentTime = Math.min(now, player.duration);
        }
      }
      clock = longest.times[indexAt(longest, now)];
      tellClock();
      if (longest.player.paused) stop();
      else requestAnimationFrame(follow);
    }

    async function start() {
      const mine = (turn += 1);
      if (clock >= end - ALMOST) clock = 0;
      const ready = pair.map((clip) => {
        const { player } = clip;
        player.currentTime = middle(clip, indexAt(clip, clock + ALMOST));
        return new Promise((done) => player.addEventListener("seeked", done, { once: true }));
      });
      toggle.textContent = "Pause both";
      try {
        await Promise.all(ready);
        if (mine !== turn) return;
        playing = true;
        await Promise.all(pair.map((clip) => clip.player.play()));
        if (mine === turn) follow();
      } catch {
        if (mine === turn) stop(); // the browser does not let it play
      }
    }

    for (const button of bar.querySelectorAll("button[data-step]")) {
      button.addEventListener("click", () => step(Number(button.dataset.step)));
    }
    toggle.addEventListener("click", () => (playing ? stop() : start()));
    range.addEventListener("input", () => {
      const wanted = (Number(range.value) / 1000) * end;
      showBoth(Math.max(...pair.map((clip) => clip.times[indexAt(clip, wanted + ALMOST)])));
    });
    speed.addEventListener("change", () => {
      for (const { player, section } of pair) {
        player.playbackRate = Number(speed.value);
        section.querySelector("select").value = speed.value;
      }
    });
    bar.hidden = false;
    tellClock();
  }

  for (const clip of clips.values()) setUp(clip);
  if (clips.size === 2) setUpBoth([...clips.values()]);
})();
