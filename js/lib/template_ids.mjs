// Every copy of a template has the template's id, by which panels tell workflows apart: an opened one gets its own.
const TEMPLATES = new Set([
  "9d5a3fb8-7c8f-51b8-aa68-8be7ba37416b", // compare_steps
  "7936297a-9ef1-5af1-95b5-6956bcf014b6", // flux2_klein_train_and_sample
  "d525ba7e-b6a2-59f6-b80e-ad2294d24cde", // sd15_train_and_sample
  "cb9a19a0-c95d-5c08-93a4-138da9ce8abe", // sdxl_train_and_sample
  "45c38f60-2070-5d4f-a4c4-90b80a5fb946", // train_and_sample
  "4ad5f87a-11ee-5d82-9b25-d60b41d16e23", // train_only
  "e71f1e50-27c7-5c34-b113-a8377f2a8d69", // use_a_trained_lora
  "cd9623d9-5852-5791-887f-92bcf9f584fc", // z_image_train_and_sample
]);

/** A random UUID of version 4; pages over plain http from another machine have no crypto.randomUUID. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** Give a workflow that is about to be loaded its own id if it has that of a template. Saved and reopened, it keeps it. */
export function ownId(workflow) {
  if (TEMPLATES.has(workflow?.id)) workflow.id = newId();
}
