// Camera -> frames, each as soon as the one before has been dealt with.

/** Shows frames until stopped; returns how to stop. `onFrame` takes an ImageBitmap, which it owns. */
export async function startCamera(onFrame) {
  if (!navigator.mediaDevices) throw new Error("A browser gives its camera to this page only over https or on this machine itself.");
  const stream = await navigator.mediaDevices
    .getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } })
    .catch((error) => {
      throw new Error(error.name === "NotAllowedError" ? "The camera was not allowed." : "No camera was found.");
    });
  const video = document.createElement("video");
  video.muted = video.playsInline = true;
  video.srcObject = stream;
  let running = true;
  const stop = () => {
    running = false;
    for (const track of stream.getTracks()) track.stop();
  };
  await video.play();
  (async () => {
    while (running) {
      await onFrame(await createImageBitmap(video));
      await new Promise(requestAnimationFrame);
    }
  })().catch(stop);
  return stop;
}
