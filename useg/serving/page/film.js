// The bar below a video: play and pause, where in the video, the time.

export function createFilm() {
  const [bar, play, moment, clock] = ["film", "play", "moment", "clock"].map((id) => document.getElementById(id));
  let video = null;

  play.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
  moment.addEventListener("input", () => (video.currentTime = moment.value));

  function update() {
    if (!video) return;
    play.textContent = video.paused ? "Play" : "Pause";
    moment.max = video.duration;
    moment.value = video.currentTime;
    clock.textContent = `${time(video.currentTime)} / ${time(video.duration)}`;
    moment.setAttribute("aria-valuetext", clock.textContent);
  }

  return {
    /** Shows the bar for a video, or hides it for null. */
    use(shown) {
      video = shown;
      bar.hidden = !video;
      for (const event of ["play", "pause", "timeupdate", "durationchange"]) video?.addEventListener(event, update);
      update();
    },
  };
}

function time(seconds) {
  const whole = Math.floor(Number.isFinite(seconds) ? seconds : 0);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
