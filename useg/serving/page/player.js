// The bar below a video: play, pause, seek, time. A live camera can only be paused.

export function createPlayer() {
  const [bar, play, seek, time] = ["player", "play", "seek", "time"].map((id) =>
    document.getElementById(id),
  );
  const events = ["play", "pause", "timeupdate", "durationchange"];
  let video = null;

  play.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
  seek.addEventListener("input", () => (video.currentTime = seek.value));

  function update() {
    if (!video) return;
    play.textContent = video.paused ? "Play" : "Pause";
    if (seek.hidden) return;
    seek.max = video.duration;
    seek.value = video.currentTime;
    time.textContent = `${formatTime(video.currentTime)} / ${formatTime(video.duration)}`;
    seek.setAttribute("aria-valuetext", time.textContent);
  }

  return {
    /** Shows the bar for a source of video.js, or hides it for null. */
    use(source) {
      for (const event of events) video?.removeEventListener(event, update);
      video = source?.video ?? null;
      for (const event of events) video?.addEventListener(event, update);
      bar.hidden = !video;
      seek.hidden = time.hidden = Boolean(source?.isCamera);
      update();
    },
  };
}

function formatTime(seconds) {
  const whole = Math.floor(Number.isFinite(seconds) ? seconds : 0);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
